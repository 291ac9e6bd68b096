"""Every row of the paper's ablation and baseline tables as the overrides that make it, upon any configuration of UniCLIP.

`python -m tools.paper_rows` prints them. The tables' numbers: Lee et al., UniCLIP, NeurIPS 2022, tables 1, 4a, 4b, 5, 6.
"""

from typing import Any

from evaluation.paper import published

WITH, WITHOUT = "model.head.augmentation=true", "model.head.augmentation=false"
HEADS = {
    "linear": ("model.head.kind=mlp", "model.head.depth=1"),
    "mlp3": ("model.head.kind=mlp", "model.head.depth=3"),
    "mlp6": ("model.head.kind=mlp", "model.head.depth=6"),
    "res1": ("model.head.kind=residual", "model.head.depth=1"),
    "res3": ("model.head.kind=residual", "model.head.depth=3"),
}
VIEWS = {"3weak": "3weak", "1weak2strong": "uniclip", "3strong": "3strong"}

# Table → row → overrides. FULL: the model that all others are held against.
ROWS: dict[str, dict[str, tuple[str, ...]]] = {
    "4a": {f"{name}, {'with' if embedding == WITH else 'without'} embedding": (*head, embedding)
           for embedding in (WITHOUT, WITH) for name, head in HEADS.items() if (name, embedding) != ("linear", WITHOUT)},
    "4b": {f"{name}, {'with' if embedding == WITH else 'without'} embedding": (*HEADS[head], embedding, f"data.recipe={recipe}")
           for embedding, head in ((WITHOUT, "res1"), (WITH, "res3")) for name, recipe in VIEWS.items()},
    "5": {
        "shared, unified": ("model.similarity.kind=shared", "loss.supervision=unified"),
        "domain, separate": ("model.similarity.kind=domain", "loss.supervision=separate"),
        "domain, unified": ("model.similarity.kind=domain", "loss.supervision=unified"),
    },
    "6": {name: (f"loss.name={name}",)
          for name in ("mil_nce", "supcon", "multi_positive_infonce", "mp_nce_unweighted", "mp_nce")},
    "1": {name: (f"objective.name={name}",) for name in ("clip", "slip", "declip", "uniclip")},
}
FULL = {"4a": "res3, with embedding", "4b": "1weak2strong, with embedding", "5": "domain, unified", "6": "mp_nce",
        "1": "uniclip"}
_LOSSES = {"multi_positive_infonce": "multi_positive_infonce_eq9", "mp_nce_unweighted": "mp_nce_unweighted_eq11",
           "mp_nce": "mp_nce_eq12"}


def in_the_paper(table: str, row: str) -> float | None:
    """ImageNet accuracy in percent that the paper has in this row of an ablation: CC3M, ViT-B/16, 50 epochs, one run."""
    name, _, embedding = row.partition(", ")
    embedding = f"{embedding.removesuffix(' embedding')}_augmentation_embedding"
    where = {"4a": ("table4a_image_head", embedding, name), "4b": ("table4b_views", embedding, name),
             "5": ("table5_similarity_supervision", row.replace(", ", "_")), "6": ("table6_loss", _LOSSES.get(row, row))}
    value: Any = published()
    for key in where.get(table, ("none",)):
        value = value.get(key, {})
    return value if isinstance(value, float) else None


def main() -> None:
    """Print every row."""
    for table, rows in ROWS.items():
        for name, overrides in rows.items():
            print(f"{table:3} {name:32} " + " ".join(f"--set {override}" for override in overrides))


if __name__ == "__main__":
    main()
