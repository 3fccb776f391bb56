"""`probing erase --dry-run`."""

from pathlib import Path

from analysis.erasure.answers import AnsweredInputs
from analysis.erasure.erasers import CONTROLS, DRAWS, LAGS, SAMPLE
from analysis.erasure.options import PARTS, Options
from analysis.erasure.run import STEM, Images, chosen_layers, head_of, require_rank
from analysis.evaluation.scores import score_file
from analysis.planning.model_cost import META, UnknownCostError, decoder_flops, image_cost, trace, weight_bytes
from analysis.planning.plan import Part, Plan, Work
from probing.data.coco import first_image
from probing.models import FINAL, layer_name, load_backbone
from probing.models.chat_templates import rendering_moment
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
    head_of(backbone)
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
        f"forward passes at most ({erasures} erasures at each layer, from the layer on)",
        "exists": f"{file}, if the settings are the same" if file.exists() else "nothing",
    }
    image, answer = first_image(images.held_out, recipe.data.view), images.answers[images.held_out.names[0]]
    batch = backbone.prepare([image])
    answered = AnsweredInputs(backbone.prepare, recipe.backbone, rendering_moment())([(image, answer)])
    tokens, width = answered.tokens.kinds.shape[1], backbone.hidden_size
    try:
        tower = image_cost(backbone.core, batch.inputs).flops
        prompt, blocks = (
            sum(decoder_flops(backbone.blocks, one.tokens.kinds.shape[1], width)) for one in (batch, answered)
        )
    except UnknownCostError as error:
        return Plan(facts | {"cost": f"unknown: {error}; erasing works all the same"})
    seen = sum(trace(one.target, pixels=one.prepare([image])).flops for one in teachers.values())
    fit, bits = len(images.fit), 8 * next(backbone.core.parameters()).element_size()
    kinds = {kind for position in options.places for kind in PARTS[position]}
    columns = width + (1 + LAGS) * options.rank * len(teachers)
    erased = int(batch.tokens.mask(*kinds).sum())
    covariances = 2 * len(layers) * erased * width * columns
    head = (
        2 * int(answered.tokens.mask("answer").sum()) * sum(weight.numel() for weight in head_of(backbone).parameters())
    )
    scored = tower + (1 + repeats) * blocks + (1 + erasures * len(layers)) * head
    llm = fit * (tower + prompt) + len(images.held_out) * scored
    sums, means = 8 * len(layers) * len(kinds) * width * columns, 4 * len(layers) * erased * width
    return Plan(
        facts,
        Work(
            samples="all images",
            count=1,
            parts={
                "checkpoint": Part(llm * (bits == 16), llm * (bits > 16), weight_bytes(backbone.core)),
                "teachers": Part(
                    flops32=(fit + min(fit, SAMPLE)) * seen,
                    memory=sum(weight_bytes(one.model) for one in teachers.values()),
                ),
                "covariances": Part(flops32=fit * covariances, memory=sums + 3 * means),
                "erasers": Part(
                    disk=means + 8 * len(layers) * len(kinds) * len(teachers) * (2 + DRAWS) * width * options.rank
                ),
                "states": Part(
                    memory=(options.micro_batch or recipe.fit.micro_batch) * len(layers) * tokens * width * bits // 8
                ),
            },
            images=fit + len(images.held_out),
        ),
    )
