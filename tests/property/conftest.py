"""Profiles of the property tests: the usual one, and ``--hypothesis-profile=long`` for an hour of its own."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("long", max_examples=4000, print_blob=True)
