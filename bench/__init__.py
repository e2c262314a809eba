"""Parry: robustness evaluation for models, data and services that defend themselves."""

__version__ = "0.1.0"
