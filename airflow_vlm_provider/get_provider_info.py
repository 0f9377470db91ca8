"""What Airflow learns about this package without importing anything else of it."""

from __future__ import annotations

from typing import Any

_INTEGRATION = "Vision-language models"

# Types are lists with "null" because the form sends null for a field that is left empty, and refuses to save a
# value that does not match. Only the engine has a default: a default is stored with every connection that is
# made in the form, and no newer version of this package could improve on it.
_CONN_FIELDS: dict[str, dict[str, Any]] = {
    "engine": {
        "label": "Engine",
        "description": (
            "Who answers: openai (any OpenAI-compatible endpoint), vllm (a vLLM server that the worker starts "
            "and shares) or transformers (in the task's own process)."
        ),
        "schema": {
            "type": ["string", "null"],
            "enum": ["openai", "vllm", "transformers"],
            "default": "openai",
        },
    },
    "model": {
        "label": "Model",
        "description": (
            "Default model: the name that the endpoint serves it under, or a Hugging Face repository or a "
            "local folder for vllm and transformers."
        ),
        "schema": {"type": ["string", "null"]},
    },
    "max_concurrency": {
        "label": "Requests in flight",
        "description": "How many requests one task keeps in flight at most; empty for the engine's default.",
        "schema": {"type": ["integer", "null"], "minimum": 1},
    },
    "requests_per_minute": {
        "label": "Requests per minute",
        "description": "Limit for one task; empty for none.",
        "schema": {"type": ["number", "null"], "minimum": 1},
    },
    "tokens_per_minute": {
        "label": "Tokens per minute",
        "description": "Limit for one task, prompt and completion together; empty for none.",
        "schema": {"type": ["number", "null"], "minimum": 1},
    },
    "timeout": {
        "label": "Timeout (seconds)",
        "description": "How long one request may take before it is tried again; empty for 300.",
        "schema": {"type": ["number", "null"], "minimum": 1},
    },
    "prompt_price_per_million": {
        "label": "Price of a million prompt tokens",
        "description": "In US dollars; with both prices, manifests report what a run cost.",
        "schema": {"type": ["number", "null"], "minimum": 0},
    },
    "completion_price_per_million": {
        "label": "Price of a million completion tokens",
        "description": "In US dollars.",
        "schema": {"type": ["number", "null"], "minimum": 0},
    },
    "headers": {
        "label": "Headers",
        "description": (
            "HTTP headers sent with every request, as a JSON object. Their values are treated as secrets."
        ),
        "schema": {"type": ["object", "null"]},
    },
    "engine_args": {
        "label": "Engine arguments",
        "description": (
            "Arguments for the vllm or transformers engine as a JSON object, by the names that these "
            'libraries give them: {"dtype": "bfloat16", "max_model_len": 8192}.'
        ),
        "schema": {"type": ["object", "null"]},
    },
}

_CONFIG_OPTIONS: dict[str, dict[str, Any]] = {
    "gpu_queue": {
        "description": (
            "Queue of tasks whose operator says engine vllm or transformers, unless its author gave it another; empty "
            "leaves them on the default queue."
        ),
        "version_added": "0.1.0",
        "type": "string",
        "example": "gpu",
        "default": "",
    },
    "gpu_pool": {
        "description": (
            "Pool of tasks whose operator says engine vllm or transformers, unless its author gave it another; empty "
            "leaves them in the default pool. A pool has to be made before tasks are scheduled in it."
        ),
        "version_added": "0.1.0",
        "type": "string",
        "example": "gpu",
        "default": "",
    },
    "vllm_command": {
        "description": (
            "What starts vLLM's OpenAI-compatible server on a worker, as it would be typed, without arguments; empty for "
            "the vLLM that is installed beside Airflow. May point into another environment."
        ),
        "version_added": "0.1.0",
        "type": "string",
        "example": "/opt/vllm/bin/vllm serve",
        "default": "",
    },
    "engine_dir": {
        "description": (
            "Folder through which the tasks of a worker find its vLLM servers; on a local disk. Empty for "
            "airflow-vlm-<user id> in the folder for temporary files."
        ),
        "version_added": "0.1.0",
        "type": "string",
        "example": "/var/lib/airflow/vlm-engines",
        "default": "",
    },
    "engine_idle_timeout": {
        "description": "Seconds after which a vLLM server that no task uses is stopped.",
        "version_added": "0.1.0",
        "type": "float",
        "example": None,
        "default": "600",
    },
    "engine_start_timeout": {
        "description": "Seconds that a vLLM server may take until it is ready.",
        "version_added": "0.1.0",
        "type": "float",
        "example": None,
        "default": "1800",
    },
    "journal_flush_answers": {
        "description": (
            "How many answers of a shard may wait at most until they are in the journal: what is asked again when "
            "a task is killed. Fewer cost more and smaller files."
        ),
        "version_added": "0.1.0",
        "type": "integer",
        "example": None,
        "default": "512",
    },
    "journal_flush_bytes": {
        "description": "How many bytes of answers of a shard may wait at most until they are in the journal.",
        "version_added": "0.1.0",
        "type": "integer",
        "example": None,
        "default": "4194304",
    },
    "journal_flush_seconds": {
        "description": "After how many seconds an answer is written to the journal, though others are few.",
        "version_added": "0.1.0",
        "type": "float",
        "example": None,
        "default": "5",
    },
}


def get_provider_info() -> dict[str, Any]:
    """Describe the provider to Airflow: the connection type with its form, and where everything else is."""
    return {
        "package-name": "airflow-provider-vlm",
        "name": "Vision-language models",
        "description": "Tags and captions image and video datasets with vision-language models.",
        "integrations": [
            {
                "integration-name": _INTEGRATION,
                "tags": ["ai"],
            }
        ],
        "hooks": [
            {"integration-name": _INTEGRATION, "python-modules": ["airflow_vlm_provider.hooks.vlm"]},
        ],
        "operators": [
            {
                "integration-name": _INTEGRATION,
                "python-modules": [
                    "airflow_vlm_provider.operators.shards",
                    "airflow_vlm_provider.operators.image_tagging",
                    "airflow_vlm_provider.operators.image_captioning",
                    "airflow_vlm_provider.operators.image_captioning_gpt4v",
                    "airflow_vlm_provider.operators.video_captioning",
                    "airflow_vlm_provider.operators.vlm_map",
                    "airflow_vlm_provider.operators.engine_servers",
                    "airflow_vlm_provider.operators.redrive",
                    "airflow_vlm_provider.operators.export",
                ],
            }
        ],
        "task-decorators": [
            {"name": "vlm", "class-name": "airflow_vlm_provider.decorators.vlm.vlm_task"},
        ],
        "connection-types": [
            {
                "connection-type": "vlm",
                "hook-class-name": "airflow_vlm_provider.hooks.vlm.VLMHook",
                "hook-name": "Vision-language model",
                "ui-field-behaviour": {
                    "hidden-fields": ["login"],
                    "relabeling": {
                        "password": "API key",
                        "schema": "Scheme",
                        "host": "Host or base URL",
                    },
                    "placeholders": {
                        "host": "https://api.openai.com/v1",
                        "schema": "https",
                        "password": "leave empty for a server that asks for none",
                    },
                },
                "conn-fields": _CONN_FIELDS,
            }
        ],
        "cli": ["airflow_vlm_provider.cli.definition.get_vlm_cli_commands"],
        "config": {"vlm": {"description": "Vision-language models.", "options": _CONFIG_OPTIONS}},
    }
