"""Serves a base model, its adapters and merged models behind one OpenAI-compatible API."""
