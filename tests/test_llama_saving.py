"""examples/llama_saving.py: saved folders are as transformers has them, or not there.

If it fails, a fine-tuned model cannot be loaded elsewhere, or a folder is overwritten.
"""

import json

import jax.numpy as jnp
import pytest
from safetensors import safe_open

import llama_cases
import llama_files
import llama_saving
from llama_cases import assert_same, edit

TEMPLATE = "{{ messages }}"


@pytest.fixture
def folder(tmp_path):
    return llama_cases.write_folder(tmp_path / "model", "qwen2")


@pytest.mark.parametrize("name", llama_cases.CONFIGS)
def test_saved_folders_are_as_transformers_names_them(name, tmp_path):
    loaded = llama_files.load(llama_cases.write_folder(tmp_path / "in", name))
    llama_saving.save(tmp_path / "new" / "out", *loaded)
    with safe_open(tmp_path / "new" / "out" / "model.safetensors", "numpy") as file:
        shapes = {x: file.get_slice(x).get_shape() for x in file.keys()}  # noqa: SIM118
        assert file.metadata()["format"] == "pt"
    expected = llama_cases.reference(name)["shapes"]
    if loaded.config.tied:
        del expected["lm_head.weight"]
    assert shapes == expected
    again = llama_files.load(tmp_path / "new" / "out")
    assert again.config == loaded.config
    assert_same(again.params, loaded.params)
    assert again.tokenizer.encode("w3 w4").ids == [1, 3, 4]
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["out"]
    files = [x for x in (tmp_path / "new" / "out").rglob("*") if x.is_file()]
    assert len({x.stat().st_mode for x in files}) == 1  # whoever reads one reads all


def test_side_files_and_config_go_along(folder, tmp_path):
    edit(folder, eos_token_id=[2, 5], note="kept")
    side = {
        "generation_config.json": '{"temperature": 0.6}',
        "tokenizer_config.json": '{"tokenizer_class": "Own"}',
        "chat_template.jinja": TEMPLATE,
        "additional_chat_templates/tools.jinja": TEMPLATE + "!",
    }
    (folder / "additional_chat_templates").mkdir()
    for name, content in side.items():
        (folder / name).write_text(content)
    llama_saving.save(tmp_path / "out", *llama_files.load(folder, jnp.bfloat16))
    for name in (*side, "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (found["eos_token_id"], found["note"]) == ([2, 5], "kept")
    assert found["torch_dtype"] == "bfloat16"


def test_a_config_of_transformers_5_stays_one(folder, tmp_path):
    written = llama_cases.reference("qwen2")["config"]
    (folder / "config.json").write_text(json.dumps(written))
    llama_saving.save(tmp_path / "out", *llama_files.load(folder, jnp.bfloat16))
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == {**written, "dtype": "bfloat16"}


def test_shards_are_written_and_read(folder, tmp_path):
    loaded = llama_files.load(folder)
    llama_saving.save(tmp_path / "out", *loaded, shard_bytes=9_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 12_000 for file in files)  # a header of names, too
    assert_same(llama_files.load(tmp_path / "out").params, loaded.params)
    llama_saving.save(tmp_path / "out", *loaded)  # ours may be replaced
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_folders_of_others_are_left_alone(folder, tmp_path):
    loaded = llama_files.load(folder)
    with pytest.raises(ValueError, match="files that were not saved by this program"):
        llama_saving.save(folder, *loaded)
    out = tmp_path / "out"
    out.mkdir()
    llama_saving.save(out, *loaded)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="files that were not saved by this program"):
        llama_saving.check_output(out)
    with pytest.raises(ValueError, match="is there and is no folder"):
        llama_saving.check_output(out / "notes.txt")


def test_an_empty_folder_is_filled_where_it_is(folder, tmp_path, monkeypatch):
    """A mounted volume cannot be renamed, nor can its parent always be written."""
    (tmp_path / "out").mkdir()
    before = (tmp_path / "out").stat().st_ino
    monkeypatch.chdir(tmp_path / "out")
    loaded = llama_files.load(folder)
    llama_saving.save(".", *loaded)
    assert (tmp_path / "out").stat().st_ino == before
    assert_same(llama_files.load(tmp_path / "out").params, loaded.params)
    assert not [x for x in (tmp_path / "out").iterdir() if x.is_dir()]


def test_nothing_is_left_of_a_save_that_fails(folder, tmp_path, monkeypatch):
    loaded = llama_files.load(folder)
    before = sorted(tmp_path.iterdir())

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(llama_saving, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        llama_saving.save(tmp_path / "out", *loaded)
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_without_a_source_is_saved(folder, tmp_path):
    config, params, tokenizer, _ = llama_files.load(folder)
    llama_saving.save(tmp_path / "out", config, params, tokenizer)
    again = llama_files.load(tmp_path / "out")
    assert again.config == config
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "</s>"
