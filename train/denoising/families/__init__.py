"""Model families behind the protocol, a file each, and which family a pipeline is of."""
