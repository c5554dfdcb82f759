"""What transformers' models of llama_cases.py say, for test_llama.py.

pip install torch transformers
python tests/data/make_llama_reference.py

With folders as arguments, which examples/llama_saving.py wrote from models of the same
names, it checks instead that transformers loads them and finds these logits:

python tests/data/make_llama_reference.py --saved FOLDER/llama2 FOLDER/mistral

Done by hand with transformers 5.24.0 and torch 2.14.1, for all five, one of them in
shards: no logit differed by more than 2e-6.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import llama_cases

FILE = pathlib.Path(__file__).with_name("llama_reference.json")
TOLERANCE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--saved", nargs="+", type=pathlib.Path, default=[])
    args = parser.parse_args()
    if args.saved:
        for folder in args.saved:
            check(folder)
        return
    made_with = f"transformers {transformers.__version__}, torch {torch.__version__}"
    cases = {name: reference(config) for name, config in llama_cases.CONFIGS.items()}
    text = json.dumps({"made_with": made_with, "cases": cases}, separators=(",", ":"))
    FILE.write_text(text.replace('},"', '},\n"') + "\n")


def reference(config: dict) -> dict:
    """Names and shapes of weights, the config as it is written today, and logits."""
    known = dict(config)
    kind = transformers.CONFIG_MAPPING[known.pop("model_type")]
    model = transformers.AutoModelForCausalLM.from_config(
        kind(**known), attn_implementation="eager"
    ).eval()
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    made = {
        name: torch.from_numpy(llama_cases.weight(name, shape))
        for name, shape in shapes.items()
        if name != "lm_head.weight" or not config["tie_word_embeddings"]
    }
    missing, _ = model.load_state_dict(made, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        written = json.loads((pathlib.Path(folder) / "config.json").read_text())
    return {"config": written, "shapes": shapes, "logits": logits_of(model)}


def logits_of(model) -> list:
    with torch.no_grad():
        found = model(torch.tensor(llama_cases.TOKENS)).logits.double().numpy()
    return [[[round(x, 6) for x in row] for row in text] for text in found.tolist()]


def check(folder: pathlib.Path) -> None:
    """That transformers loads a folder, tokenizer and all, and finds the same logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = json.loads(FILE.read_text())["cases"][folder.name]["logits"]
    error = np.abs(np.array(logits_of(model)) - expected).max()
    assert error <= TOLERANCE, error
    if model.config.model_type != "qwen2":  # Qwen2Tokenizer is BPE, whatever is there
        assert tokenizer("w3 w4").input_ids == [1, 3, 4]
    print(f"{folder.name}: {len(tokenizer)} tokens, logits within {error:.1e}")


if __name__ == "__main__":
    main()
