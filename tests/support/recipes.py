"""Recipes for tests of how they are read."""

from __future__ import annotations

TAGGING = "process:\n  - image_tagging_vlm_mapper:\n"
