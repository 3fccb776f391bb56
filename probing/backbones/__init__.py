"""Multimodal LLMs behind one interface, one file per family."""
