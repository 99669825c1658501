"""Jobs: a corpus goes in, a filled output comes out; stopped and resumed at will.

A row's identity is its id and the hash of its text, its carried columns, and of the model and settings that decide its
vector. What is in the output is skipped; a kill at any moment loses nothing and repeats nothing but the requests that
were in flight; a row that cannot be embedded goes to the rejects with its reason.
"""

from vllm_embed.jobs._job import embed
from vllm_embed.jobs._summary import Progress, Summary

__all__ = ["Progress", "Summary", "embed"]
