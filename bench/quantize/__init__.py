"""`fen quantize`: a checkpoint -> the same model in fewer bits, as compressed-tensors safetensors."""
