"""The network that training starts from: a backbone with its weights, and a new head."""

from itertools import islice
from pathlib import Path

from stages.common.device import make_deterministic
from stages.common.machine import resolve_workers
from stages.common.params import Params
from stages.images.batches import Batches, Order
from stages.images.index import Entry, class_names
from stages.network.backbones import stock_model
from stages.network.checkpoint import Description, continue_from
from stages.network.network import Network, build_network, calibrate_batchnorm, set_trainable
from stages.network.objective import outputs_for
from stages.network.weights import find_weights, load_into

# More images hardly change the statistics of a random network.
CALIBRATION_BATCHES, CALIBRATION_BATCH = 16, 64


def build_initial(params: Params, entries: list[Entry]) -> tuple[Network, Description, str]:
    """Build the network of `params.model` with a frozen backbone; the same seed gives the same network.

    The training images `entries` name the classes and calibrate a random backbone.

    Returns:
        The network, the metadata of its checkpoint, and the origin of its weights, in words.

    Raises:
        StageError: no such network or weights, or they do not fit each other or the size of the images.
    """
    model, classes = params.model, class_names(entries)
    make_deterministic(params.seed)
    weights = find_weights(model.arch, model.weights)
    preprocessing = weights.preprocessing.framed(model.image_size, model.framing, params.data.grey_max)
    stock = stock_model(model.arch, preprocessing.crop)
    load_into(stock, weights, model.arch)
    hidden, standardized, own = model.hidden, False, weights.own
    if own is not None and (own.head, own.classes) == (model.head, tuple(classes)):
        hidden, standardized = own.hidden, own.standardized
    network = build_network(stock, model.head, hidden, outputs_for(len(classes)), preprocessing.crop, standardized)
    description = Description(
        model.arch,
        model.head,
        hidden,
        tuple(classes),
        preprocessing,
        weights.source,
        weights.sha256,
        standardized=standardized,
        recipe={"seed": params.seed, "model": model.model_dump()},
    )
    source = weights.source or "random"
    if own is not None:
        kept = continue_from(network, description, weights.tensors, own)
        source += f" with {'its' if kept else 'a new'} head"
    if weights.source is None:
        root, workers = Path(params.data.path), resolve_workers(params.workers)
        order = Order(len(entries), params.seed)
        batches = Batches(root, entries, preprocessing, CALIBRATION_BATCH, workers, order=order)
        images = (images for images, _ in islice(batches, CALIBRATION_BATCHES) if len(images) > 1)
        calibrate_batchnorm(network, images)
    set_trainable(network, 0)
    return network, description, source
