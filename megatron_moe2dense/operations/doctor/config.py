"""Config of `doctor`."""

from __future__ import annotations

from pydantic import model_validator

from megatron_moe2dense.common.config import Config, key


class DoctorConfig(Config):
    """`moe2dense doctor`."""

    config: str | None = key(None, "YAML of `distill` to judge on this machine; null: the machine alone")
    settings: list[str] = key([], "`key.path=value` settings of that YAML, as given to `distill`")
    processes: int | None = key(
        None, "processes of the job; null: torchrun's WORLD_SIZE, else the GPUs here, else as many as the layout needs", "processes", gt=0
    )

    @model_validator(mode="after")
    def _settings_have_effect(self) -> DoctorConfig:
        if self.config is None and (self.settings or self.processes is not None):
            raise ValueError("settings and processes have no effect without config")
        return self
