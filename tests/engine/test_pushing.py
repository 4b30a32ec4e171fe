"""Pushing to the hub, with a hub that is made up: what is checked before any work, what is sent, and the model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants, errors

import aerogel
from aerogel.engine.pushing import check, push
from aerogel.errors import AerogelError
from aerogel.io.record import files
from tests.folders import digests, model_folder


class FakeApi:
    """The part of HfApi that is used; what is asked of it is written down, and nothing is passed that would defeat HF_TOKEN."""

    user: dict[str, Any]
    repositories: dict[str, list[str]]
    sent: list[tuple[str, dict[str, Any]]]
    fails: Exception | None

    def whoami(self) -> dict[str, Any]:
        if not self.user:
            raise errors.LocalTokenNotFoundError("no token")
        return self.user

    def model_info(self, name: str) -> Any:
        if name not in self.repositories:
            raise errors.RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self.repositories[name]])

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        self.sent.append(("create_repo", {"name": name, "private": private, "exist_ok": exist_ok}))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.fails is not None:
            raise self.fails
        self.sent.append(("upload_folder", {"name": repo_id, "files": set(digests(folder_path)), "message": commit_message}))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    fake = type("Fake", (FakeApi,), {"repositories": {}, "sent": [], "fails": None})
    fake.user = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    model_folder(folder / "model")
    aerogel.compress(
        folder / "model", {"name": "mine", "steps": [{"rtn": {"scheme": "W8A16_G32"}}]}, output=folder / "out", measures=["size"]
    )
    return folder / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def refused(name: str) -> str:
    with pytest.raises(AerogelError) as caught:
        check(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_pushed_private_with_a_card(api: type[FakeApi], out: Path) -> None:
    assert push(out, "me/model-w8") == f"{constants.ENDPOINT}/me/model-w8"
    (created, uploaded) = api.sent
    assert created == ("create_repo", {"name": "me/model-w8", "private": True, "exist_ok": True})
    assert uploaded[1]["name"] == "me/model-w8"
    assert {"README.md", "config.json", "model.safetensors", "aerogel.json", "tokenizer.json"} <= uploaded[1]["files"]
    assert uploaded[1]["message"] == f"mine by Aerogel {aerogel.__version__}"


def test_public_is_asked_for_by_name(api: type[FakeApi], out: Path) -> None:
    push(out, "lab/model", public=True)
    assert api.sent[0][1]["private"] is False


def test_the_card_has_what_the_hub_reads(api: type[FakeApi], out: Path) -> None:
    record = files.read(out)
    files.write(out, record.replaced(model=record.model.model_copy(update={"name": "owner/base", "revision": "abc"})))
    push(out, "me/model-w8")
    _, header, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": "owner/base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["aerogel", "rtn"],
    }
    assert text.startswith("\n# model-w8\n\nowner/base is ")
    assert '\nmodel = AutoModelForCausalLM.from_pretrained("me/model-w8")\n' in text
    assert "| Weights on disk |" in text
    assert "\n  - rtn:" in text or "\n- rtn:" in text
    assert str(out) not in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["steps"][0]["rtn"]["scheme"] == "W8A16_G32"


def test_a_model_from_a_folder_has_no_base_model(api: type[FakeApi], out: Path) -> None:
    push(out, "me/model")
    assert "base_model" not in (out / "README.md").read_text()


def test_a_card_that_is_there_stays(api: type[FakeApi], out: Path) -> None:
    (out / "README.md").write_text("My own words.")
    push(out, "me/model")
    assert (out / "README.md").read_text() == "My own words."


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", "'model' is no name for a model on the hub; expected OWNER/NAME"),
        ("me/model/more", "'me/model/more' is no name for a model on the hub; expected OWNER/NAME"),
        ("you/model", "this token cannot push as you; it is of me, lab"),
    ],
)
def test_a_name_that_cannot_be_is_refused(api: type[FakeApi], name: str, message: str) -> None:
    assert refused(name) == message


def test_a_token_that_cannot_write_is_refused(api: type[FakeApi]) -> None:
    api.user = {**api.user, "auth": {"accessToken": {"role": "read"}}}
    assert "the token of me may only read; set HF_TOKEN to a token that may write (" in refused("me/model")
    api.user = {}
    assert "there is no token for the hub; set HF_TOKEN to a token that may write (" in refused("me/model")


def test_a_model_that_is_there_is_not_overwritten(api: type[FakeApi], out: Path) -> None:
    api.repositories["me/model"] = [".gitattributes", "README.md"]
    check("me/model")
    api.repositories["me/model"] += ["model.safetensors"]
    message = "me/model exists on the hub and holds model.safetensors; give another name, or push with --overwrite for a new commit"
    assert refused("me/model") == message
    with pytest.raises(AerogelError, match="exists on the hub"):
        push(out, "me/model")
    assert api.sent == []
    assert not (out / "README.md").exists()
    push(out, "me/model", overwrite=True)
    assert [call for call, _ in api.sent] == ["create_repo", "upload_folder"]


def test_without_a_connection_nothing_is_started(api: type[FakeApi], monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: FakeApi) -> None:
        raise errors.OfflineModeIsEnabled("offline mode is on")

    monkeypatch.setattr(api, "whoami", offline)
    assert refused("me/model").startswith("me/model cannot be pushed: the hub cannot be reached (offline mode is on); check")


def test_a_push_that_breaks_off_can_be_repeated(api: type[FakeApi], out: Path) -> None:
    api.fails = errors.HTTPError("the connection was closed")
    with pytest.raises(AerogelError, match=r"could not be pushed \(the connection was closed\); run `aerogel push .* me/model` again$"):
        push(out, "me/model")
    api.fails = None
    push(out, "me/model")


def test_a_folder_that_is_no_result_or_was_changed_is_refused(api: type[FakeApi], out: Path, tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=r"has no aerogel\.json; give a folder that `aerogel compress` wrote"):
        push(model_folder(tmp_path / "plain"), "me/model")
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(json.dumps(json.loads(config) | {"quantization_config": 3}))
    with pytest.raises(AerogelError, match=r"quantization_config in config\.json is 3, expected a JSON object"):
        push(out, "me/model")
    (out / "config.json").write_text(config)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(AerogelError, match=r"is not what aerogel\.json has the checksum of"):
        push(out, "me/model")
    assert api.sent == []
