"""Tag and caption image and video datasets with vision-language models, from Airflow."""

from __future__ import annotations

__version__ = "0.1.0"
