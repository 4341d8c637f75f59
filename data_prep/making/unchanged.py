"""Compares the images of a source with those that finished shards were made of."""

from collections.abc import Callable, Mapping

from data_prep.making.progress import ProgressCounter
from data_prep.making.shards import SourceState, hash_images
from data_prep.sources import SourceReader


def changed_shards(
    made_of: Mapping[int, SourceState], keys: Callable[[int], list[str]], read: SourceReader, *, contents: bool
) -> list[int]:
    """Numbers of the shards whose images are no longer those that they were made of.

    Where sizes and times are the same, so are the images, unless `contents` is set. Where they are not, for example
    because the source was copied, the images' bytes are compared.

    Args:
        made_of: What each shard was made of, by its number.
        keys: The source's keys of a shard.
        contents: Compares the bytes of all images.
    """
    doubtful = [
        number
        for number, state in made_of.items()
        if contents or state.facts is None or state.facts != read.facts(keys(number))
    ]
    changed = []
    with ProgressCounter("comparing", total=sum(len(keys(number)) for number in doubtful), unit="images") as counter:

        def tick() -> None:
            counter.tick()
            counter.show()

        for number in doubtful:
            if hash_images(keys(number), read, tick=tick) != made_of[number].images:
                changed.append(number)
    return changed
