"""What this machine can do: each thing that the jobs rest on, tried and compared with the CPU's result."""
