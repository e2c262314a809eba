"""Certifiers: in an attack's place, what proves that no attack within a radius succeeds."""
