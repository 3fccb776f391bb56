"""`probing align --dry-run`."""

from pathlib import Path

from analysis.alignment.run import AlignRecipe, labelled_images
from analysis.evaluation.scores import score_file
from analysis.planning.plan import Plan
from probing.data.panoptic import Panoptic
from probing.models import check_models, layer_name
from probing.runs.resume import holds_run


def plan_alignment(recipe: AlignRecipe, out: Path) -> Plan:
    """Says what `align` would do; writes nothing.

    Raises:
        UserError: as `align`, except for faults in the weights.
    """
    layers = check_models(recipe.backbone, recipe.teachers, recipe.layers)
    maps, images = labelled_images(recipe)
    holds_run(out, recipe)

    def state(name: str) -> str:
        if score_file(out, f"scores/{name}", images.split).exists():
            return "exists"
        return "resumes" if (out / "state" / f"{name}.safetensors").exists() else "new"

    annotations = "panoptic" if isinstance(maps, Panoptic) else "instances"
    return Plan(
        {
            "run": str(out),
            "checkpoint": f"{recipe.backbone.checkpoint}, layers {', '.join(map(layer_name, layers))}",
            "images": f"{len(images):,} of {images.split} with masks ({annotations}, {len(maps.names)} classes)",
            "teachers": ", ".join(f"{name} ({one.id})" for name, one in recipe.teachers.items()) or "none",
            "pass over a sample": f"{min(recipe.sample, len(images)):,} images ({state('sample')})",
            "pass over all": f"{len(images):,} images ({state('alignment')})",
            "writes": f"{out / 'results.csv'}, scores, pictures of {min(recipe.pictures, len(images))} images",
        }
    )
