"""Kandinsky 2.2: a prior and a decoder."""

from combined_models import tiny_kandinsky

from families.family import Family


def make():
    return dict(tiny_kandinsky().components)


FAMILY = Family(
    "Kandinsky 2.2",
    make=make,
    arguments={"height": 32, "width": 32},
    classes={
        "KandinskyV22CombinedPipeline": {"prior_num_inference_steps": 2},
    },
)
