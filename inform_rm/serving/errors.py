"""Failures of a request, with the status code that tells the client."""

from collections.abc import Mapping

from inform_rm.errors import InputError


class RowError(InputError):
    """A row that cannot be encoded; ``row`` is its place in the request, from 0, which the message names as well."""

    def __init__(self, row: int, message: str):
        super().__init__(message)
        self.row = row


class RequestError(Exception):
    """Answered with this status and ``{"error": message, "row": row}``."""

    def __init__(self, status: int, message: str, row: int | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.row, self.headers = status, message, row, headers
