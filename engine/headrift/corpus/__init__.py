"""Corpus jobs: files of prompts in, a folder of scored parts out."""
