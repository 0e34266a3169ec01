"""Errors that end a command: each is one line for the user, and exit code 2.

EvalError
├── SampleError         a held-out file with a row that cannot be used
├── RecordError         a run directory that is absent, damaged, in use, or made from other inputs
├── ServerError         a server that cannot be reached, was lost, or does not know an arm
└── RuleError           a gate rule that names no metric or cannot be parsed
"""

from __future__ import annotations


class EvalError(Exception):
    """Says what was given, what is allowed and what to do."""


class SampleError(EvalError):
    pass


class RecordError(EvalError):
    pass


class ServerError(EvalError):
    pass


class RuleError(EvalError):
    pass
