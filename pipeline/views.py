"""Executes augmentation vectors with DALI, on CUDA or on the CPU; the only file that imports DALI.

Its pipeline takes (encoded images, vectors, ids) and returns (views, vectors, ids) together, so a view can never be
parted from the vector that made it. DALI's own WebDataset reader is not used: it cannot resume elastically, reports no
keys and dies of one bad image; bytes come from our loader through `external_source`.
"""

# DALI's stubs know neither its own types nor what `pipeline_def` does to a function.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false, reportPrivateImportUsage=false

import os
import re

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from pipeline.console import WorkFailed
from pipeline.images import Undecodable
from pipeline.sampling import BLUR_WINDOW
from pipeline.schema import MEAN, STD, VECTOR_SIZE


def _view(image, vector, size: int, device: str):
    """One view of one image; `vector` stays on the CPU because DALI takes named arguments only from there."""
    at = [vector[i] for i in range(VECTOR_SIZE)]
    start = fn.stack(at[1], at[0])
    end = fn.stack(at[1] + at[3], at[0] + at[2])
    view = fn.resize(image, device=device, size=[size, size], roi_start=start, roi_end=end, roi_relative=True,
                     interp_type=types.INTERP_CUBIC, antialias=True)
    view = fn.color_twist(view, brightness=1 + at[4], contrast=1 + at[5], saturation=(1 + at[6]) * (1 - at[10]),
                          hue=at[7] * 360)
    if at[8] > 0:  # sigma 0 would mean "derive it from the window", not "no blur"
        view = fn.gaussian_blur(view, sigma=at[8], window_size=BLUR_WINDOW)
    return fn.crop_mirror_normalize(view, mirror=fn.cast(at[9], dtype=types.INT32), dtype=types.FLOAT, output_layout="CHW",
                                    mean=[255 * m for m in MEAN], std=[255 * s for s in STD])


@pipeline_def(enable_conditionals=True)
def _pipeline(size: int, views: int, device: str):
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    vectors = fn.external_source(name="vectors", dtype=types.FLOAT, ndim=2)
    ids = fn.external_source(name="ids", dtype=types.INT64, ndim=0)
    image = fn.decoders.image(encoded, device="mixed" if device == "gpu" else "cpu", output_type=types.RGB,
                              jpeg_fancy_upsampling=True, adjust_orientation=False)  # `images` decides which way is up
    done = [_view(image, vectors[v], size, device) for v in range(views)]
    if device == "gpu":
        return *done, vectors.gpu(), ids.gpu()
    return *done, vectors, ids


_DECODER = "operator `nvidia.dali.fn.decoders.image`"
_NO_MEMORY = re.compile(r"bad_alloc|out of memory|allocat|failure: '#5'", re.IGNORECASE)  # 5: nvImageCodec's allocator


def _named(error: RuntimeError, count: int) -> Exception:
    """What DALI means by an error: it has one class and a text for all of them, whose place and cause are told apart here."""
    place, _, cause = str(error).partition("encountered:")
    told = next((line for line in cause.splitlines() if line), type(error).__name__)
    if _NO_MEMORY.search(cause or place):
        return WorkFailed(f"the executor has no memory left for the views of {count} images ({told}): lower "
                          "optim.batch_size")
    if _DECODER in place and "cuda" not in cause.lower():
        return Undecodable(f"DALI: {told}")
    return error


class DaliExecutor:
    """Encoded images and their vectors → views, by one DALI pipeline.

    One undecodable image invalidates a DALI pipeline for good; the pipeline is then dropped and a fresh one built for the
    next call. Raises Undecodable when the decoder refused an image, WorkFailed when memory ran out, and what else DALI
    raises as it is.
    """

    def __init__(self, size: int, threads: int | None = None, device_id: int | None = None):
        self.size, self._threads, self._device_id = size, threads or os.cpu_count() or 1, device_id
        self._stream = None if device_id is None else torch.cuda.Stream(device_id)
        self._built: tuple[int, int, Pipeline] | None = None

    def _pipe(self, batch: int, views: int) -> Pipeline:
        if self._built is None or self._built[0] < batch or self._built[1] != views:
            pipe = _pipeline(self.size, views, "cpu" if self._device_id is None else "gpu", batch_size=batch,
                             num_threads=self._threads, device_id=self._device_id, prefetch_queue_depth=1)
            pipe.build()
            self._built = (batch, views, pipe)
        return self._built[2]

    def __call__(self, encoded: list[bytes], vector_BVA: np.ndarray, sample_id_B: np.ndarray
                 ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """→ V tensors (B, 3, S, S) float32, vectors (B, V, 11), ids (B,), all on the executor's device."""
        pipe = self._pipe(len(encoded), vector_BVA.shape[1])
        try:
            pipe.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
            pipe.feed_input("vectors", np.ascontiguousarray(vector_BVA))
            pipe.feed_input("ids", np.ascontiguousarray(sample_id_B))
            *views, vectors, ids = self._copies(pipe.run())
        except RuntimeError as error:
            self._built = None
            raise _named(error, len(encoded)) from error
        return views, vectors, ids

    def _copies(self, outputs: tuple) -> list[torch.Tensor]:
        """Tensors of torch's own. On a GPU the copies wait for none of the step's kernels, and are made when this returns:
        DALI may write into an output's memory again as soon as it is let go."""
        with torch.cuda.stream(self._stream):
            copies = [torch.from_dlpack(output.as_tensor()).clone() for output in outputs]
        if self._stream is None:
            return copies
        self._stream.synchronize()
        for copy in copies:
            copy.record_stream(torch.cuda.current_stream(self._device_id))  # whose kernels will read it
        return copies

    def close(self) -> None:
        """Drop the pipeline and its memory."""
        self._built = None
