"""SoftTriple: digits trained as two classes, and the classes' centers before and after merging."""

from __future__ import annotations

from benchmarks.claims.soft_triple import BASELINE, SHOWN, THRESHOLD, TRIPLETS, WAYS, Outcome, picture, run
from benchmarks.claims.training import in_parallel
from benchmarks.report.page import Section, claims, code, heading, table, text
from benchmarks.report.page import picture as drawn

STEPS = 1500
TRAINED = (BASELINE, *SHOWN)
LOOP = """\
loss = SoftTripleLoss(num_classes=2, embedding_dim=32, centers_per_class=20)
groups = param_groups(model, loss, lr=3e-3, center_lr=1e-2)
groups[0]["eps"] = 1e-8                        # For the network, which isn't pretrained.
optimizer = torch.optim.Adam(groups, eps=0.01, weight_decay=1e-4)
for x, y in batches:
    value = loss(model(x), y)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
loss.distinct_centers(0.2)                     # How many centers of each class have not merged.
centers, classes = loss.merge_centers(0.2)     # The remaining centers."""


def section() -> Section:
    print("\nSoftTriple: digits trained as two classes of five, looked for as ten")
    outcomes = dict(
        zip(TRAINED, in_parallel(run, [(("digits", way), 0, STEPS) for way in TRAINED], "training"), strict=True)
    )
    head = ("training", "centers of a class", "distinct", "Recall@1", "NMI")
    rows = [_row(way, outcome) for way, outcome in outcomes.items()]
    scores = table(head, rows)
    return Section(
        "SoftTriple: embeddings from several centers a class",
        [
            text(
                "An embedding for retrieval is learned by pulling samples to the center of their class: a softmax on "
                "normalised vectors. Where a class has several modes one center is too few. SoftTriple gives each "
                "class many, of which the near ones count most, and a regulariser merges what is not needed; there "
                "are no triplets to sample (Qian, Shang, Sun, Hu, Li and Jin, ICCV 2019)."
            ),
            code(LOOP),
            heading("Digits"),
            text(
                f"Scikit-learn's digits. Training knows only which half of the digits, 0 to 9, each is in: two classes "
                f"of five modes. {STEPS} steps of 32 digits with a small perceptron, one seed; then the ten digits are "
                "looked for among others, and clustered."
            ),
            scores,
            drawn(
                picture({way: outcomes[way] for way in SHOWN}),
                "Embeddings of test digits on the plane of their largest variance, coloured by digit; numbers stand "
                "where a digit's mean is, circles and squares where the two classes' centers are. Right: centers "
                f"closer than {THRESHOLD:g} merged. Only with tau above 0, the regulariser, do they merge.",
            ),
            *_claims(),
        ],
    )


def _row(way: str, outcome: Outcome) -> tuple[str, ...]:
    scores = (f"{score:.1f} %" for score in (outcome.recall, outcome.nmi))
    return way, str(WAYS[way]["centers_per_class"]), f"{outcome.distinct:g}", *scores


def _claims() -> list[str]:
    """Show the results of benchmarks/claims/soft_triple.py, with more seeds, if they exist."""
    if not (content := claims("soft_triple")):
        return []
    names = {BASELINE: "one center", TRIPLETS: "triplets of pytorch-metric-learning"}
    rows = []
    for found in content["results"]:
        scores = [f"{found[key]['mean']:.1f} ± {found[key]['interval']:.1f} %" for key in ("recall", "nmi")]
        distinct = "" if found["name"] == TRIPLETS else f"{found['distinct']['mean']:.1f}"
        rows.append((found["data"], names.get(found["name"], found["name"]), distinct, *scores))
    return [
        heading("More seeds"),
        text(
            f"Means of {content['seeds']} seeds and their 95 % intervals, from an earlier run "
            f"({content['date'][:10]}, benchmarks/claims/soft_triple.py); of letters, 13 were trained and the other 13 "
            "looked for."
        ),
        table(("data", "training", "distinct centers", "Recall@1", "NMI"), rows),
    ]
