"""What holds for all tests: an Airflow home of their own, and no settings of whoever runs them."""

from __future__ import annotations

import os
import tempfile

# Airflow reads these when it is first imported, so they are set before any test module is.
for _name in [name for name in os.environ if name.startswith("AIRFLOW_")]:
    del os.environ[_name]
_home = tempfile.TemporaryDirectory(prefix="airflow-vlm-tests-")
os.environ["AIRFLOW_HOME"] = _home.name
os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
