"""Makes hidden states or targets of some images not finite, as an overflow of float16 would."""

import torch

from probing.models.base import Backbone
from probing.teachers import Teacher
from probing.utils.images import square


def poison_states(monkeypatch, images, layers, value=torch.nan):
    """Changes one number of the states of some images at some layers, whichever batch they come in.

    Args:
        monkeypatch: undoes it.
        images: the list that indices point into; an image is known by its pixels.
        layers: layer → indices.
        value: of the last number of the last image token.
    """
    stream, known = Backbone.stream, {}

    def poisoned(self, batch, wanted, visit):
        for index in {index for indices in layers.values() for index in indices} - known.keys():
            known[index] = self.prepare([square(images.read(index))]).inputs["pixel_values"][0]

        def visited(layer, hidden):
            hidden = hidden.clone()
            for row, pixels in enumerate(batch.inputs["pixel_values"]):
                if any(torch.equal(pixels, known[index]) for index in layers.get(layer, ())):
                    hidden[row, batch.tokens.mask("image")[row].nonzero()[-1], -1] = value
            visit(layer, hidden)

        stream(self, batch, wanted, visited)

    monkeypatch.setattr(Backbone, "stream", poisoned)


def poison_targets(monkeypatch, name, images, indices, value=torch.nan):
    """Changes one number of the features that teachers of a name give of some images."""
    target = Teacher.target

    def poisoned(self, pixels):
        found = target(self, pixels)
        if self.name == name:
            bad = self.prepare([square(images.read(index)) for index in indices]).to(pixels)
            for row, one in enumerate(pixels):
                if any(torch.equal(one, other) for other in bad):
                    found[row, -1, -1] = value
        return found

    monkeypatch.setattr(Teacher, "target", poisoned)
