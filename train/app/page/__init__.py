"""The page in Gradio: what stands where, and what is called when."""
