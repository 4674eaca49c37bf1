"""Model files into networks: safetensors folders and GGUF files."""
