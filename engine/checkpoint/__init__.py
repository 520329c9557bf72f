"""A path, a short name or a Hugging Face id -> config, named tensors, tokenizer. Imports no torch.

`open_checkpoint(model)` is the one entry. Tensor names are Hugging Face's Llama names whatever the file calls them.
"""

from engine.checkpoint.open import Checkpoint, open_checkpoint
from engine.checkpoint.tensors import StoredTensor
from engine.checkpoint.tokenizer import Tokenizer

__all__ = ["Checkpoint", "StoredTensor", "Tokenizer", "open_checkpoint"]
