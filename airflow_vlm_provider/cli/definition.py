"""What ``airflow vlm`` understands. Every ``airflow`` command imports this, so it imports next to nothing."""

# Airflow's Arg has no types.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

from airflow.cli.cli_config import ActionCommand, Arg, GroupCommand, lazy_load_command

_AWS_CONN_ID = Arg(
    ("--aws-conn-id",),
    help=(
        "Connection for S3. By default aws_default where there is one, and else boto3's own search for credentials; "
        "so is an empty one"
    ),
    metavar="CONN_ID",
)
_STORAGE_CONN_ID = Arg(
    ("--storage-conn-id",),
    help="Connection for other object stores (gs://, abfs://, ...). By default the one in the URI, or the scheme's own",
    metavar="CONN_ID",
)
_OUTPUT = Arg(
    ("-o", "--output"),
    help="How to print it: for people or for machines (default: text)",
    choices=("text", "json"),
    default="text",
)
_VERBOSE = Arg(("-v", "--verbose"), help="Print details, and what is logged on the way", action="store_true")


def get_vlm_cli_commands() -> list[GroupCommand]:
    """The commands that this provider adds to ``airflow``."""
    show = ActionCommand(
        name="show",
        help="Show what became of a shard, or of all shards of a destination",
        func=lazy_load_command("airflow_vlm_provider.cli.ledger.show"),
        args=(
            Arg(
                ("uri",),
                help="A destination (s3://bucket/out), or a shard in it (s3://bucket/out/part-0.jsonl)",
            ),
            _AWS_CONN_ID,
            _STORAGE_CONN_ID,
            _OUTPUT,
            _VERBOSE,
        ),
    )
    prune = ActionCommand(
        name="prune",
        help="Remove old journal segments that no manifest refers to, and old plans",
        description=(
            "Remove journal segments that no manifest refers to (of attempts that never committed, and with answers to "
            "questions that are not asked any more), and plans, that are older than so many days. What a manifest "
            "refers to is never removed."
        ),
        func=lazy_load_command("airflow_vlm_provider.cli.ledger.prune"),
        args=(
            Arg(("destination",), help="Where outputs and the ledger are: s3://bucket/out"),
            Arg(
                ("--older-than",),
                help="Days, at least 1: more than any run takes from its first answer to its last retry",
                type=float,
                required=True,
                metavar="DAYS",
            ),
            Arg(("--dry-run",), help="Only print what would be removed", action="store_true"),
            _AWS_CONN_ID,
            _STORAGE_CONN_ID,
            _OUTPUT,
            _VERBOSE,
        ),
    )
    ledger = GroupCommand(
        name="ledger", help="What is done, and the answers that were paid for", subcommands=(show, prune)
    )
    check = ActionCommand(
        name="check",
        help="Say what a Data-Juicer recipe would run, or all that is wrong with it",
        description=(
            "Say what recipe_task_group() makes of a Data-Juicer recipe: its operators with their parameters, where "
            "they read and write, and what of the recipe has no meaning here. Ends in an error, which names all that is "
            "wrong, when the recipe can't be run. No connection is looked up, and nothing but the recipe is read."
        ),
        func=lazy_load_command("airflow_vlm_provider.cli.recipe.check"),
        args=(Arg(("recipe",), help="The recipe's file"), _OUTPUT, _VERBOSE),
    )
    engines = ActionCommand(
        name="list",
        help="List the vLLM servers of this worker",
        func=lazy_load_command("airflow_vlm_provider.cli.engine.list_engines"),
        args=(_OUTPUT, Arg(("-v", "--verbose"), help="List those that have ended, too", action="store_true")),
    )
    stop = ActionCommand(
        name="stop",
        help="Stop vLLM servers of this worker",
        func=lazy_load_command("airflow_vlm_provider.cli.engine.stop_engine"),
        args=(
            Arg(("key",), help="Keys, or their beginnings, as `list` shows them; none for all", nargs="*"),
            Arg(
                ("--force",),
                help="Also those that tasks use, which start them again, or that DAG runs keep",
                action="store_true",
            ),
            _VERBOSE,
        ),
    )
    logs = ActionCommand(
        name="logs",
        help="Show what a vLLM server has printed",
        func=lazy_load_command("airflow_vlm_provider.cli.engine.engine_logs"),
        args=(
            Arg(("key",), help="Its key, or the beginning of it, as `list` shows it"),
            Arg(("-n", "--lines"), help="How many lines of its end (default: 100)", type=int, default=100),
            Arg(("-f", "--follow"), help="Go on with what is added, until it ends", action="store_true"),
            _VERBOSE,
        ),
    )
    engine = GroupCommand(
        name="engine",
        help="The vLLM servers of the worker that this is run on",
        subcommands=(engines, stop, logs),
    )
    recipe = GroupCommand(name="recipe", help="Data-Juicer's recipes", subcommands=(check,))
    return [
        GroupCommand(
            name="vlm",
            help="Tag and caption datasets with vision-language models",
            subcommands=(ledger, recipe, engine),
        )
    ]
