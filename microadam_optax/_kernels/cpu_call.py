"""How XLA calls the loops of `cpu_block.py`: by its FFI, from C to C, without Python.

A handler gets the address of a call frame, xla/ffi/api/c_api.h, and reads from it the
addresses of the arrays. The rows are cut into chunks, and whoever is free takes the next
one: the thread that XLA calls from, and those of XLA's own pool, to which as many tasks
are given as it has threads. So no threads are added to those that XLA has anyway, however
many leaves and devices are updated at once, and numba's own layers, of which one aborts
when two threads call it, are not needed.

It cannot hang. The calling thread takes chunks as well, all of them if nobody helps, as
in a forked process, which has no pool; then it waits only for chunks that another thread
is in the middle of. A task that starts late finds none left. What threads share, a *job*,
is freed by the last of them.
"""

from numba.core.types import float32, int32, int64, uint8, uint16

from microadam_optax._kernels import _ffi
from microadam_optax._kernels.cpu_block import update_rows
from microadam_optax._kernels.cpu_data import Factors, Leaf, Row, Shape, embed, inline
from microadam_optax._kernels.cpu_llvm import address_of, allocate, pointer, release
from microadam_optax._kernels.cpu_threads import add_to, call, let_others_run, read_from

CHUNK = 1 << 15  # elements
MAJOR, MINOR = _ffi.version(_ffi.header())

# Fields of a job, int64: what threads count with, then what all of them read.
_OWNERS, _NEXT, _DONE, _CHUNKS, _ROWS, _SIZE, _NUMBERS, _ARRAYS = range(8)

# Where things are in XLA's structs, in words of 8 bytes.
_EXTENSION, _API, _CONTEXT, _ARGUMENTS, _RESULTS, _ATTRIBUTES = 1, 2, 3, 9, 14, 20
_COUNT_OF_ARGUMENTS = 7
_BUFFER_DATA, _ARRAY_DATA = 3, 2
_ERROR_DESTROY, _SCHEDULE, _NUM_THREADS = 8, 17, 18


@inline
def words(address):
    return pointer(address, int64)


@embed
def work(job, dtype, widen, narrow):
    """Chunks of a job until none is left, and then its last owner frees it."""
    job = words(job)
    numbers = words(job[_NUMBERS])
    while True:
        chunk = add_to(words(address_of(job) + 8 * _NEXT), 1)
        if chunk >= job[_CHUNKS]:
            break
        update_chunk(job, numbers, chunk, dtype, widen, narrow)
        add_to(words(address_of(job) + 8 * _DONE), 1)
    disown(job)


@inline
def disown(job):
    if add_to(words(address_of(job) + 8 * _OWNERS), -1) == 1:
        release(job)


@embed
def update_chunk(job, numbers, chunk, dtype, widen, narrow):
    shape = shape_of(job, numbers)
    leaf = Leaf(shape, numbers[0], numbers[1])
    gradient = pointer(job[_ARRAYS], dtype)
    arrays = Row(
        gradient,
        gradient,
        pointer(job[_ARRAYS + 1], uint8),
        pointer(job[_ARRAYS + 2], uint16),
        pointer(job[_ARRAYS + 3], uint8),
        pointer(job[_ARRAYS + 4], uint16),
        0,
    )
    four = pointer(job[_ARRAYS + 5], float32)
    shares = pointer(job[_ARRAYS + 8], float32)
    factors = Factors(
        four[0],
        four[1],
        four[2],
        four[3],
        pointer(job[_ARRAYS + 7], float32),
        shares[0],
        shares[1],
    )
    first = chunk * job[_ROWS]
    last = min(first + job[_ROWS], job[_SIZE])
    update_rows(arrays, first, last, factors, leaf, widen, narrow)


@inline
def shape_of(job, numbers):
    """Of blocks, as `cpu.update` tells it."""
    block, bits, k, slots = numbers[2], numbers[3], numbers[4], numbers[5]
    width, parts = (block * bits) >> 3, 2 if bits == 4 else 4 if bits == 2 else 1
    lanes = (width + 31) & ~31
    start = 0
    if slots > 0:
        start = int64(pointer(job[_ARRAYS + 6], int32)[0])
    index_bytes = 1 if block <= 256 else 2
    return Shape(
        block, parts, width, lanes, lanes * parts, bits, k, slots, start, index_bytes
    )


@embed
def handle(frame, task):
    """Answers XLA, which asks what the handler is, or runs it."""
    frame = words(frame)
    if frame[_EXTENSION] != 0 and pointer(frame[_EXTENSION], int32)[2] == 1:
        metadata = pointer(words(frame[_EXTENSION])[3], int32)
        metadata[6], metadata[7], metadata[8] = MAJOR, MINOR, 0
        return 0
    api = words(frame[_API])
    job = make_job(frame)
    schedule(frame, api, task, job)
    chunks = job[_CHUNKS]
    call(task, address_of(job))
    spins = 0
    while read_from(words(address_of(job) + 8 * _DONE)) < chunks:
        spins += 1
        if spins > 1000:
            let_others_run()
    disown(job)
    return 0


@inline
def make_job(frame):
    job = allocate(_ARRAYS + 9, int64)
    arguments, attributes = words(frame[_ARGUMENTS]), words(frame[_ATTRIBUTES])
    windowed = frame[_COUNT_OF_ARGUMENTS] > 4
    job[_NUMBERS] = words(attributes[1])[_ARRAY_DATA]
    job[_ARRAYS + 8] = words(attributes[0])[_ARRAY_DATA]
    for i in range(3):
        job[_ARRAYS + i] = words(arguments[i])[_BUFFER_DATA]
    if windowed:
        for i in range(3, 8):
            job[_ARRAYS + i] = words(arguments[i])[_BUFFER_DATA]
    else:
        job[_ARRAYS + 5] = words(arguments[3])[_BUFFER_DATA]
        job[_ARRAYS + 3] = job[_ARRAYS + 4] = job[_ARRAYS + 6] = job[_ARRAYS + 7] = 0
    block, size = words(job[_NUMBERS])[2], words(job[_NUMBERS])[6]
    rows = max(1, CHUNK // block)
    job[_SIZE], job[_ROWS], job[_CHUNKS] = size, rows, (size + rows - 1) // rows
    job[_NEXT] = job[_DONE] = 0
    return job


@inline
def schedule(frame, api, task, job):
    """Asks threads of XLA's pool for help with a job; returns how many."""
    arguments = allocate(6, int64)
    arguments[0], arguments[1], arguments[2] = 32, 0, frame[_CONTEXT]
    arguments[3] = address_of(arguments) + 40
    arguments[5] = 0
    job[_OWNERS] = 2
    threads = 0
    large = job[_CHUNKS] > 2
    if large and not failed(api, call(api[_NUM_THREADS], address_of(arguments))):
        threads = arguments[5]
    helpers = max(0, min(threads, job[_CHUNKS]) - 1)
    job[_OWNERS] = 2 + helpers
    for _ in range(helpers):
        arguments[0], arguments[1], arguments[2] = 40, 0, frame[_CONTEXT]
        arguments[3], arguments[4] = task, address_of(job)
        if failed(api, call(api[_SCHEDULE], address_of(arguments))):
            disown(job)
    release(arguments)
    return helpers


@inline
def failed(api, error):
    """Whether XLA returned an error, which is then ours to free."""
    if error == 0:
        return False
    arguments = allocate(3, int64)
    arguments[0], arguments[1], arguments[2] = 24, 0, error
    call(api[_ERROR_DESTROY], address_of(arguments))
    release(arguments)
    return True
