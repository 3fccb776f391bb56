"""`probing erase --dry-run`."""

from pathlib import Path

from analysis.erasure.erasers import CONTROLS
from analysis.erasure.options import Options
from analysis.erasure.run import STEM, Images, chosen_layers, require_rank
from analysis.evaluation.scores import score_file
from analysis.planning.model_cost import META, UnknownCostError, decoder_flops, image_cost, trace, weight_bytes
from analysis.planning.plan import Plan, Work
from probing.data.coco import first_image
from probing.models import FINAL, layer_name, load_backbone
from probing.runs.directory import Run, runs_in
from probing.teachers import load_teachers


def plan_erasure(path: Path, options: Options) -> Plan:
    """Says what `erase` does to a run, or to the first run of a folder, and what that takes; writes nothing.

    Raises:
        UserError: as `erase`, except for faults in the weights.
    """
    runs = runs_in(path)
    run = Run.open(runs[0] if runs else path)
    recipe, layers, images = run.recipe, chosen_layers(run, options), Images.list(run, options)
    changes = {"device_map": None, "quantization_config": None}
    backbone = load_backbone(recipe.backbone.model_copy(update=changes), META, with_head=True)
    teachers = load_teachers(recipe.teachers, META)
    require_rank(options.rank, backbone.hidden_size, teachers)
    erasures = len(options.places) * len(teachers) * len(CONTROLS)
    remaining = [0 if layer == FINAL else backbone.layers - int(layer) for layer in layers]
    repeats = erasures * sum(remaining) / backbone.layers
    file = score_file(run.path, STEM, images.held_out.split)
    facts = {
        "run": f"{path}" + (f" ({len(runs)} runs, of which this is the first)" if runs else ""),
        "checkpoint": f"{recipe.backbone.checkpoint}, layers {', '.join(map(layer_name, layers))}",
        "fitting": f"{len(images.fit):,} images of {images.fit.split} x 1 forward pass",
        "measuring": f"{len(images.held_out):,} images of {images.held_out.split} x {1 + repeats:.3g} "
        f"forward passes ({erasures} erasures at each layer, from the layer on)",
        "exists": f"{file}, if the settings are the same" if file.exists() else "nothing",
    }
    image = first_image(images.held_out, recipe.data.view)
    batch = backbone.prepare([image])
    tokens, width = batch.tokens.kinds.shape[1], backbone.hidden_size
    try:
        blocks = sum(decoder_flops(backbone.blocks, tokens, width))
        forward = image_cost(backbone.core, batch.inputs).flops + blocks
    except UnknownCostError as error:
        return Plan(facts | {"cost": f"unknown: {error}; erasing works all the same"})
    seen = sum(trace(one.target, pixels=one.prepare([image])).flops for one in teachers.values())
    fit, bits = len(images.fit), 8 * next(backbone.core.parameters()).element_size()
    covariances = 2 * len(layers) * len(options.places) * tokens * width**2
    llm = fit * forward + len(images.held_out) * (forward + repeats * blocks)
    rank = min(options.rank, width)
    sums = 8 * len(layers) * len(options.places) * width * (width + 2 * rank * len(teachers))
    return Plan(
        facts,
        Work(
            samples="all images",
            count=1,
            flops16=llm * (bits == 16),
            flops32=llm * (bits > 16) + fit * (seen + covariances),
            memory={
                "checkpoint": weight_bytes(backbone.core),
                "teachers": sum(weight_bytes(one.model) for one in teachers.values()),
                "covariances": sums,
                "states": (options.micro_batch or recipe.fit.micro_batch) * len(layers) * tokens * width * bits // 8,
            },
            sharded=0,
            disk=12 * len(layers) * erasures * width * rank,
            images=fit + len(images.held_out),
        ),
    )
