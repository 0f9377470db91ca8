"""Keep the headers of a connection out of the UI and the REST API, whatever their names are.

The API server hides values of a connection's extra by their key's name. That covers ``Authorization`` and
``x-api-key`` but not ``X-Gateway`` or ``Cookie``. Masking the values themselves, as the hook does for logs, would
spoil the form: on saving, the API server puts a masked value back only where the key's name says that it is a
secret, and stores the asterisks anywhere else.
"""

from __future__ import annotations

import logging
from typing import Any

from airflow.plugins_manager import AirflowPlugin

log = logging.getLogger(__name__)

SENSITIVE_NAME = "headers"


class MaskHeadersPlugin(AirflowPlugin):
    """Makes ``headers`` one of the names that the API server hides, as ``[core] sensitive_var_conn_names`` does.

    The configuration itself can't be added to: it is read before any plugin is loaded.
    """

    name = "vlm_mask_headers"

    @classmethod
    def on_load(cls, *_args: Any, **_kwargs: Any) -> None:
        try:
            from airflow._shared.secrets_masker import _secrets_masker

            names = _secrets_masker().sensitive_variables_fields
            if SENSITIVE_NAME not in names:
                names.append(SENSITIVE_NAME)
        except (ImportError, AttributeError) as error:
            log.warning(
                "The UI and the REST API may show headers of vlm connections in clear (%s). Add %r to "
                "[core] sensitive_var_conn_names in Airflow's configuration.",
                error,
                SENSITIVE_NAME,
            )
