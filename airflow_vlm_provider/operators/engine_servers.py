"""Operators that tie the life of a worker's vLLM server to a DAG run, as setup and teardown."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowNotFoundException

from airflow_vlm_provider.errors import ConfigError, EngineError
from airflow_vlm_provider.operators.engines import make_vllm_engine
from airflow_vlm_provider.operators.placement import PlacedOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_vlm_provider.engines.vllm import VLLMEngine


class _EngineServerOperator(PlacedOperator):
    """What both need to name the same server: see :class:`StartEngineOperator`."""

    template_fields: Sequence[str] = ("vlm_conn_id", "api_or_hf_model")
    ui_color = "#cfe8d5"

    def __init__(
        self,
        *,
        vlm_conn_id: str = "vlm_default",
        api_or_hf_model: str | None = None,
        model_params: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(engine="vllm", **kwargs)
        self.vlm_conn_id = vlm_conn_id
        self.api_or_hf_model = api_or_hf_model
        self.model_params = model_params
        # No event: tasks are copied deeply, as for a part of a DAG.
        self._stopped = False

    @classmethod
    def local_engine(cls, told: Mapping[str, Any]) -> str | None:
        """No other engine has servers on the worker."""
        return super().local_engine({**told, "engine": "vllm"})

    def on_kill(self) -> None:
        """Wait no longer."""
        self._stopped = True

    def _engine(self, context: Context) -> VLLMEngine:
        from airflow_vlm_provider.hooks.vlm import VLMHook

        ti = context["ti"]
        return make_vllm_engine(
            VLMHook(self.vlm_conn_id),
            model=self.api_or_hf_model,
            model_params=self.model_params,
            holder={"dag_id": ti.dag_id, "run_id": ti.run_id, "task_id": ti.task_id},
        )

    @staticmethod
    def _pin(context: Context) -> str:
        ti = context["ti"]
        return f"{ti.dag_id} {ti.run_id}"


class StartEngineOperator(_EngineServerOperator):
    """
    Have a vLLM server started on the worker, and kept for this DAG run even while no task uses it.

    Without this the first task that needs a server starts it, and it stops when it was idle for a while. With it the
    model is loaded before the first such task runs, and stays until :class:`StopEngineOperator`::

        start = StartEngineOperator(task_id="start")
        stop = StopEngineOperator(task_id="stop")
        start >> tag >> stop.as_teardown(setups=start)

    It is the server of the worker that this task runs on: with several workers on the queue, the others start theirs
    when they need them, and the task that is to stop it may run on one of those, where it finds nothing to give back.
    So give such DAGs a queue that one worker listens to. The server is that of an operator with the same connection,
    model and ``model_params``.

    :param vlm_conn_id: Connection of type ``vlm`` (templated).
    :param api_or_hf_model: Model; None takes the connection's, or else Qwen/Qwen2.5-VL-7B-Instruct (templated).
    :param model_params: Engine arguments by vLLM's own names, over the connection's ``engine_args``.
    :param max_hours: So long the server is kept at most, should the teardown never run.
    """

    def __init__(self, *, max_hours: float = 24.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(max_hours, int | float) or isinstance(max_hours, bool) or max_hours <= 0:
            raise ConfigError(f"max_hours={max_hours!r} must be a number above 0.")
        self.max_hours = max_hours

    def execute(self, context: Context) -> dict[str, Any]:
        """Wait until the server is ready, and pin it.

        :return: ``key`` of the server on its worker, and ``loads``: how often its keeper has loaded the model.
        :raises AirflowFailException: something only the author can mend.
        :raises AirflowException: it could not be started this time.
        """
        try:
            lease = self._engine(context).make_lease()
            try:
                attached = lease.attach(stopped=lambda: self._stopped)
                if attached is None:
                    raise AirflowException("The task was told to stop before the server was ready.")
                lease.pin(self._pin(context), until=time.time() + 3600 * self.max_hours)
            finally:
                lease.release()
        except (ConfigError, AirflowNotFoundException) as error:
            raise AirflowFailException(str(error)) from error
        except EngineError as error:
            raise AirflowException(str(error)) from error
        self.log.info("vLLM is ready, and kept for this run; its log is %s", lease.server.log)
        return {"key": lease.server.key, "loads": attached.loads}


class StopEngineOperator(_EngineServerOperator):
    """
    Give back what :class:`StartEngineOperator` had kept, and stop the server unless somebody else uses it.

    Takes the same ``vlm_conn_id``, ``api_or_hf_model`` and ``model_params``, and has to run on the same worker: give both
    a queue that one worker listens to. On another one this only warns, and the server is kept for ``max_hours``. It does
    not matter if there is no server any more.
    """

    def execute(self, context: Context) -> dict[str, Any]:
        """Give it back.

        :return: ``key`` of the server on its worker, and whether it was ``stopped``.
        :raises AirflowFailException: something only the author can mend.
        """
        try:
            lease = self._engine(context).make_lease()
        except (ConfigError, AirflowNotFoundException) as error:
            raise AirflowFailException(str(error)) from error
        stopped = lease.unpin(self._pin(context))
        if stopped is None:
            self.log.warning(
                "No vLLM server is kept for this run on this worker. If StartEngineOperator ran on another worker, its "
                "server is kept there until max_hours have passed, or until `airflow vlm engine stop --force KEY` there. "
                "Give both tasks a queue that only one worker listens to."
            )
        elif stopped:
            self.log.info("vLLM is told to stop")
        else:
            self.log.info("vLLM is left to those who use it")
        return {"key": lease.server.key, "stopped": bool(stopped)}
