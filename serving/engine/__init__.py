"""Turns prompt token ids into completion token ids; one Protocol, several implementations."""
