"""A service as the victim: something that is asked and shows no weights, such as an endpoint or a user's function."""

from bench.service.declared import Service, declared_by, service
from bench.service.desk import Asked, Called, Desk, Line, Spent
from bench.service.journal import Journal

__all__ = ["Asked", "Called", "Desk", "Journal", "Line", "Service", "Spent", "declared_by", "service"]
