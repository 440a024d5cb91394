"""Bring the adapter to the server: written beside and renamed, loaded under a name that says its content.

A name is `nspo-<run>-<update>-<digest of the weights>`. One name never stands for two adapters, so a completion that
comes back under the right name can't be of an older one, and loading twice does no harm.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nspo_lightning.atomic import replacing_folder
from nspo_lightning.rollout.server_client import RolloutServerError, ServerClient


class AdapterShelf:
    """The adapters of one run on one server: the current one loaded, older ones gone."""

    def __init__(self, client: ServerClient) -> None:
        self.client = client
        self.settings = client.settings
        self.folder = Path(self.settings.adapter_folder).expanduser().absolute()
        seen_there = self.settings.server_adapter_folder
        self.server_folder = Path(seen_there) if seen_there else self.folder
        self.run = hashlib.sha256(str(self.server_folder).encode()).hexdigest()[:8]
        self.current = ""

    @property
    def prefix(self) -> str:
        """What the names of this run's adapters begin with."""
        return f"nspo-{self.run}-"

    def name_of(self, weights: Mapping[str, Tensor], update: int) -> str:
        """Name an adapter by its tensors and by the number of updates, for people who read the server's log."""
        digest = hashlib.sha256()
        for name, tensor in sorted(weights.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return f"{self.prefix}{update}-{digest.hexdigest()[:12]}"

    def publish(self, policy: nn.Module, update: int) -> str:
        """Write a PEFT model's adapter, have the server load it, drop the older ones, and return its name there."""
        weights = {name: value for name, value in policy.named_parameters() if value.requires_grad}
        name = self.name_of(weights, update)
        if name != self.current:
            if not (self.folder / name).is_dir():
                self._write(policy, name)
            self.load(name)
            self.current = name
            self._clear(name)
        return name

    def load(self, name: str) -> None:
        """Have the server load a written adapter, and see that it did."""
        path = str(self.server_folder / name)
        try:
            self.client.post("/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except RolloutServerError as error:
            if not self._has(name, path):  # another rank was faster, or a try went through whose answer was lost
                raise RolloutServerError(
                    f"{error} It was asked to load the adapter at {path}: the server must see that folder, be started "
                    "with `--enable-lora`, and allow the adapter's rank (vLLM: `--max-lora-rank`)."
                ) from error
            return
        if not self._has(name, path):
            raise RolloutServerError(
                f"The rollout server took the adapter '{name}' and does not list it. With several API processes "
                "(`--api-server-count`) only one of them has it: run one."
            )

    def _has(self, name: str, path: str) -> bool:
        for model in self.client.models():
            if model["id"] == name:
                return model.get("root") in (None, path)
        return False

    def _write(self, policy: Any, name: str) -> None:
        try:
            with replacing_folder(self.folder / name) as beside:
                policy.save_pretrained(str(beside), save_embedding_layers=False)
                beside.chmod(0o755)
        except OSError as error:
            raise RolloutServerError(
                f"`rollout_server.adapter_folder`: could not write the adapter to {self.folder} ({error}). Give a "
                "folder with room that this process may write and the server may read."
            ) from error

    def _clear(self, keep: str) -> None:
        for model in self.client.models():
            name = str(model["id"])
            if name.startswith(self.prefix) and name != keep:
                self.client.status_of("/unload_lora_adapter", {"lora_name": name})  # gone already: all the better
        for folder in self.folder.glob(f"*{self.prefix}*"):
            if folder.name != keep:
                shutil.rmtree(folder, ignore_errors=True)
