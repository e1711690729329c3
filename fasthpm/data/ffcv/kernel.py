"""The compiled loop over `.beton` samples: JPEG decode, crop, resize, flip, colour jitter. See `images`.

A JPEG is decoded to its planes Y, Cb, Cr as they are stored, mostly with chroma of half resolution; each plane is
resized straight to the output, and colour is converted for the output's pixels alone. What libjpeg's upsampling of
chroma would have done is part of the chroma's resizing weights, so the result is that of decoding to RGB, cutting and
resizing, up to rounding. A JPEG with restart markers (`_cut_jpeg`) is decoded only where the crop needs it.

The resize is separable: rows first, LANES of them at a time, stored column by column, so that the second pass too
works on contiguous LANES. All sums run in the same order on every machine: no fast-math.

numba keeps the compiled loop in `__pycache__` beside this file, else (not writable) in the user's cache folder;
NUMBA_CACHE_DIR moves it. Where none is writable, each process compiles for itself (some seconds). Everything that is
compiled stands in this one file, which is long for it, because numba renews its cache only when this file changes.
"""

import threading
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from fasthpm.data.compiling import compiled
from fasthpm.data.ffcv.beton import JPEG
from fasthpm.data.ffcv.turbojpeg import export_functions

Array = NDArray[Any]
AREA, BICUBIC = 0, 1
INTERPOLATIONS = {"area": AREA, "bicubic": BICUBIC}
DAMAGED, FOREIGN = 1, 2  # statuses: libturbojpeg failed or warned; the header is not what the table says

LANES = 16
GROUP = 4  # taps per pass; tables are padded with zero weights to a multiple of it
KEEP_BYTES = 64 << 20  # larger scratch memory is given back after the call

# As plain literals numba would compile what takes them once more for each.
ZERO, ONE, THREE = np.int64(0), np.int64(1), np.int64(3)

# libturbojpeg's numbers
RGB_SPACE, YCC, GREY_SPACE = 0, 1, 2
RGB, GREY = 0, 6
LIMIT_SCANS = 32768
MAX_SIDE = 65500
FACTORS_X = np.array([1, 2, 2, 1, 1, 4, 1])  # how much coarser chroma is, by TJSAMP: 444 422 420 grey 440 411 441
FACTORS_Y = np.array([1, 1, 2, 1, 2, 1, 4])
ONLY_LUMA = 3

export_functions()
u8, u64, i32, i64, f32 = types.uint8, types.uint64, types.int32, types.int64, types.float32
_open = types.ExternalFunction("fasthpm_tjInitDecompress", u64())
_close = types.ExternalFunction("fasthpm_tjDestroy", i32(u64))
_header = types.ExternalFunction("fasthpm_tjDecompressHeader3", i32(u64, u64, u64, u64, u64, u64, u64))
_planes = types.ExternalFunction("fasthpm_tjDecompressToYUVPlanes", i32(u64, u64, u64, u64, i32, u64, i32, i32))
_pixels = types.ExternalFunction("fasthpm_tjDecompress2", i32(u64, u64, u64, u64, i32, i32, i32, i32, i32))
_memcpy = types.ExternalFunction("fasthpm_memcpy", u64(u64, u64, u64))
_memchr = types.ExternalFunction("fasthpm_memchr", u64(u64, i32, u64))


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(u8)(address), build


@numba.njit
def _bytes_at(address: Any, length: Any) -> Any:
    return numba.carray(_pointer(np.uint64(address)), (length,))


# ----------------------------------------------------------------------------------------------------------- records
class Table(NamedTuple):
    """Weights of one axis: out pixel o is the sum over t of weights[o * taps + t] * in[first[o] + t]."""

    first: Any  # int32 [out]
    weights: Any  # float32 [out * taps]
    taps: Any
    low: Any  # first source index that is used
    high: Any  # last + 1
    used: Any  # the most taps of one pixel


class Axes(NamedTuple):
    """The tables of a plane."""

    rows: Any
    columns: Any


class Plane(NamedTuple):
    """Samples of a decoded image, or of a part of it."""

    samples: Any  # uint8
    stride: Any  # bytes from one row to the next
    limit: Any  # the rows that exist
    top: Any  # row of the image that the first sample stands for
    left: Any  # and its column


class Work(NamedTuple):
    """Scratch memory of a resize."""

    totals: Any  # float32, of LANES rows
    turned: Any  # the same, column by column
    sums: Any  # float32, of three channels of the output
    rounded: Any  # uint8, the same


class Memory(NamedTuple):
    """Scratch memory of a sample."""

    scratch: Any  # uint8: a cut JPEG and decoded planes
    tables: Any  # (first, weights) of luma's rows and columns, and of chroma's
    work: Any
    slots: Any  # uint64: numbers that libturbojpeg takes or gives by their address


class Buffers(NamedTuple):
    """What `_decode` cuts a sample's memory from."""

    scratch: Any  # uint8
    floats: Any  # float32
    firsts: Any  # int32
    slots: Any  # uint64
    sizes: Any  # of `totals` / LANES, of a table's weights, of a table


# ---------------------------------------------------------------------------------------------------------- weights
@numba.njit
def _cubic(x: Any) -> Any:
    """Keys' cubic with a = -0.5, which PIL uses."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0 if x < 2.0 else 0.0


@numba.njit
def _count_taps(length: Any, out: Any, interpolation: Any) -> Any:
    """How many source pixels an out pixel can touch, at most, padded to GROUP."""
    scale = length / out
    taps = int(np.ceil(4 * max(scale, 1.0))) if interpolation == BICUBIC else int(np.ceil(scale)) + 1
    return -(-min(taps, length) // GROUP) * GROUP


@numba.njit
def _weigh(start: Any, length: Any, out: Any, flipped: Any, interpolation: Any, first: Any, weights: Any) -> Any:
    """Fill the table that resizes [start, start + length) to `out` pixels, seeing nothing beyond; returns its taps."""
    taps = _count_taps(length, out, interpolation)
    scale = length / out
    width = max(scale, 1.0)
    for o in range(out):
        low, high = o * scale, (o + 1) * scale
        if interpolation == BICUBIC:
            centre = (o + 0.5) * scale
            begin, end = max(int(centre - 2 * width + 0.5), 0), min(int(centre + 2 * width + 0.5), length)
        else:
            begin = min(int(low), length - 1)
            end = max(min(int(np.ceil(high)), length), begin + 1)
        end = min(end, begin + taps)
        row = out - 1 - o if flipped else o
        first[row] = start + begin
        line = weights[row * taps : (row + 1) * taps]
        total = 0.0
        for t in range(end - begin):
            x = begin + t
            if interpolation == BICUBIC:
                weight = _cubic((x - centre + 0.5) / width)
            else:
                weight = max(min(high, x + 1.0) - max(low, float(x)), 0.0)
            line[t] = weight
            total += weight
        scaling = np.float32(1.0 / total)
        for t in range(taps):
            line[t] = line[t] * scaling if t < end - begin else f32(0)
    return taps


@numba.njit
def _coarsen(fine: Any, factor: Any, smooth: Any, limit: Any, first: Any, weights: Any) -> Any:
    """The table for a plane that is `factor` times coarser, from that of full resolution; returns taps.

    Upsampling, as libjpeg does it (3/4 of the nearest sample, 1/4 of the next if `smooth`, else repeated), is linear:
    here it is multiplied into the weights. `limit`: samples of the coarse axis; the last one is repeated.
    """
    taps = -(-(fine.taps // factor + 3) // GROUP) * GROUP
    out = len(first)
    for o in range(out):
        for t in range(taps):
            weights[o * taps + t] = f32(0)
        begin = max(fine.first[o] // factor - (1 if smooth else 0), 0)
        first[o] = begin
        for t in range(fine.taps):
            weight = fine.weights[o * fine.taps + t]
            if weight == 0.0:
                continue
            pixel = fine.first[o] + t
            nearest = pixel // factor
            if smooth:
                other = min(max(nearest + (1 if pixel % 2 else -1), 0), limit - 1)
                weights[o * taps + other - begin] += np.float32(0.25) * weight
                weight *= np.float32(0.75)
            weights[o * taps + nearest - begin] += weight
    return taps


@numba.njit
def _span(first: Any, taps: Any, weights: Any) -> Any:
    """First and last + 1 source index that a table uses, and the most taps of one pixel."""
    low, high, used = np.int64(first[0]), np.int64(first[0]), 1
    for o in range(len(first)):
        last = taps - 1
        while last > 0 and weights[o * taps + last] == 0.0:
            last -= 1
        low, high = min(low, np.int64(first[o])), max(high, np.int64(first[o]) + last)
        used = max(used, last + 1)
    return low, high + 1, used


# ----------------------------------------------------------------------------------------------------------- resize
@numba.njit
def _sum_rows(plane: Any, stride: Any, left: Any, limit: Any, first: Any, line: Any, total: Any) -> None:
    """total[x] = the weighted sum of rows first, first + 1, … of the plane's `limit` rows, from byte `left` on."""
    width = len(total)
    for t in range(0, len(line), GROUP):
        if t and line[t] == 0.0 and line[t + 1] == 0.0 and line[t + 2] == 0.0 and line[t + 3] == 0.0:
            break
        w0, w1, w2, w3 = line[t], line[t + 1], line[t + 2], line[t + 3]
        row = first + t
        a = min(row, limit - 1) * stride + left
        b = min(row + 1, limit - 1) * stride + left
        c = min(row + 2, limit - 1) * stride + left
        d = min(row + 3, limit - 1) * stride + left
        r0, r1, r2, r3 = plane[a : a + width], plane[b : b + width], plane[c : c + width], plane[d : d + width]
        if t == 0:
            for x in range(width):
                total[x] = w0 * f32(r0[x]) + w1 * f32(r1[x]) + w2 * f32(r2[x]) + w3 * f32(r3[x])
        else:
            for x in range(width):
                total[x] += w0 * f32(r0[x]) + w1 * f32(r1[x]) + w2 * f32(r2[x]) + w3 * f32(r3[x])


@intrinsic
def _sum_vectors(_context: Any, target: Any, source: Any, stride: Any, weights: Any, count: Any) -> Any:
    """target[:] = the sum over t < count of weights[t] * source[t * stride :], LANES of float32 each; addresses, bytes.

    The LLVM instructions themselves: of a loop over LANES in Python the compiler would have to prove far too much.
    """

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        target, source, stride, weights, count = arguments
        vector = ir.VectorType(ir.FloatType(), LANES)
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        total = cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * LANES))
        with cgutils.for_range(builder, count) as loop:
            at = builder.add(source, builder.mul(loop.index, stride))
            column = builder.load(builder.inttoptr(at, vector.as_pointer()), align=4)
            at = builder.add(weights, builder.mul(loop.index, ir.Constant(count.type, 4)))
            weight = builder.load(builder.inttoptr(at, ir.FloatType().as_pointer()))
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), weight, ir.Constant(ir.IntType(32), 0))
            all_lanes = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), lanes)
            builder.store(builder.fadd(builder.load(total), builder.fmul(all_lanes, column)), total)
        builder.store(builder.load(total), builder.inttoptr(target, vector.as_pointer()), align=4)
        return _context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp, types.intp), build


@numba.njit
def _sum_columns(turned: Any, step: Any, channel: Any, columns: Any, out: Any) -> None:
    """out [o, LANES] = the weighted sum of columns of one channel of turned [x, step, LANES]."""
    bytes_each = 4 * LANES
    source, target, line = np.intp(turned.ctypes.data), np.intp(out.ctypes.data), np.intp(columns.weights.ctypes.data)
    for o in range(len(out) // LANES):
        at = np.int64(columns.first[o]) - columns.low
        count = min(
            columns.used, columns.high - columns.low - at
        )  # no further than what there is: the weights beyond are 0
        at = source + (at * step + channel) * bytes_each
        _sum_vectors(target + o * bytes_each, at, step * bytes_each, line + o * columns.taps * 4, count)


@numba.njit
def _resize_rows(plane: Any, step: Any, channel: Any, rows: Any, columns: Any, start: Any, work: Any, out: Any) -> None:
    """LANES rows of the output, from row `start` on, of one channel: out [x, LANES], not yet rounded.

    `step`: bytes of `plane` from one pixel to the next. `channel` 0 fills `turned`, which the other channels share.
    """
    width = (columns.high - columns.low) * step
    totals, turned = work.totals[: LANES * width], work.turned[: LANES * width]
    if channel == 0:
        start_byte = (columns.low - plane.left) * step
        for lane in range(min(LANES, len(rows.first) - start)):
            y = start + lane
            line, total = rows.weights[y * rows.taps : (y + 1) * rows.taps], totals[lane * width : (lane + 1) * width]
            _sum_rows(plane.samples, plane.stride, start_byte, plane.limit, rows.first[y] - plane.top, line, total)
        for x in range(width):
            for lane in range(LANES):
                turned[x * LANES + lane] = totals[lane * width + x]
    _sum_columns(turned, step, channel, columns, out)


@numba.njit
def _clip(value: Any) -> Any:
    value = value if value > f32(0) else f32(0)
    value = value if value < f32(255) else f32(255)
    return np.uint8(i32(value + f32(0.5)))


@numba.njit
def _round(values: Any, rounded: Any) -> None:
    for x in range(len(values)):
        rounded[x] = _clip(values[x])


@numba.njit
def _to_rgb(luma: Any, blue: Any, red: Any, r: Any, g: Any, b: Any) -> None:
    """JFIF's YCbCr, float32, to RGB, uint8."""
    for x in range(len(luma)):
        y, cb, cr = luma[x], blue[x] - f32(128), red[x] - f32(128)
        r[x] = _clip(y + f32(1.402) * cr)
        g[x] = _clip(y - f32(0.344136286) * cb - f32(0.714136286) * cr)
        b[x] = _clip(y + f32(1.772) * cb)


@numba.njit
def _write_rows(planes: Any, count: Any, image: Any) -> None:
    """planes [3, x, LANES], `count` apart, to image [rows, x, C]; of apart 0 the first stands for all."""
    rows, width, channels = image.shape
    r, g, b = planes, planes[count:], planes[2 * count :]
    for row in range(rows):
        line = image[row]
        if channels == 3:
            for x in range(width):
                line[x, 0] = r[x * LANES + row]
                line[x, 1] = g[x * LANES + row]
                line[x, 2] = b[x * LANES + row]
        else:
            for x in range(width):
                line[x, 0] = r[x * LANES + row]


@numba.njit
def _resize_pixels(pixels: Any, step: Any, fine: Any, work: Any, image: Any) -> None:
    """Resize whole pixels of `step` bytes into image [H, W, C]; C 1 takes their first channel, step 1 repeats it."""
    count = image.shape[1] * LANES
    sums, rounded = work.sums, work.rounded
    channels = min(step, image.shape[2])
    for y in range(0, image.shape[0], LANES):
        for c in range(channels):
            _resize_rows(pixels, step, np.int64(c), fine.rows, fine.columns, y, work, sums[c * count : (c + 1) * count])
        _round(sums[: channels * count], rounded[: channels * count])
        _write_rows(rounded, ZERO if channels == 1 else count, image[y : y + LANES])


@numba.njit
def _resize_planes(luma: Any, blue: Any, red: Any, fine: Any, coarse: Any, work: Any, image: Any) -> None:
    """Resize Y, Cb and Cr into image [H, W, 3]; `fine`, `coarse`: luma's and chroma's tables."""
    count = image.shape[1] * LANES
    sums, rounded = work.sums, work.rounded
    y, cb, cr = sums[:count], sums[count : 2 * count], sums[2 * count : 3 * count]
    r, g, b = rounded[:count], rounded[count : 2 * count], rounded[2 * count : 3 * count]
    for row in range(0, image.shape[0], LANES):
        _resize_rows(luma, ONE, ZERO, fine.rows, fine.columns, row, work, y)
        _resize_rows(blue, ONE, ZERO, coarse.rows, coarse.columns, row, work, cb)
        _resize_rows(red, ONE, ZERO, coarse.rows, coarse.columns, row, work, cr)
        _to_rgb(y, cb, cr, r, g, b)
        _write_rows(rounded, count, image[row : row + LANES])


# ------------------------------------------------------------------------------------------------------ partial JPEGs
@numba.njit
def _find_scan(source: Any) -> Any:
    """Of a baseline JPEG with one scan and restart markers: where its size and its scan stand, and the interval.

    Returns (position of height and width in the frame header, first byte of the scan, MCUs per restart interval); the
    interval is 0 for anything else, which is decoded whole.
    """
    size_at = components = interval = 0
    at, end = 2, len(source)
    while at + 4 <= end and source[at] == 0xFF:
        marker = source[at + 1]
        length = source[at + 2] * 256 + source[at + 3]
        if length < 2 or at + 2 + length > end or marker == 0xFF or (0xD0 <= marker <= 0xD9):
            break
        if marker == 0xDA:
            whole = size_at > 0 and length == 6 + 2 * components and source[at + 4] == components
            return size_at, at + 2 + length, interval if whole else 0
        if marker == 0xDD and length == 4:
            interval = source[at + 4] * 256 + source[at + 5]
        elif (marker == 0xC0 or marker == 0xC1) and size_at == 0 and length >= 8:
            size_at, components = at + 5, source[at + 9]
        elif 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            break
        at += 2 + length
    return 0, 0, 0


@numba.njit
def _next_restart(source: Any, at: Any) -> Any:
    """Position of the next marker in the scan that is not a stuffed byte, or -1."""
    base, end = source.ctypes.data, len(source)
    while at + 1 < end:
        found = _memchr(base + np.uint64(at), 0xFF, np.uint64(end - 1 - at))
        if found == 0:
            return -1
        at = np.int64(found - np.uint64(base))
        if source[at + 1] != 0:
            return at
        at += 2
    return -1


@numba.njit
def _cut_jpeg(source: Any, shape: Any, unit: Any, need: Any, out: Any) -> Any:
    """Write a JPEG of only those restart intervals that hold the pixels of `need` to `out`.

    `shape`: height and width of the image; `unit`: of an MCU; `need`: top, bottom, left, right in pixels. Returns
    (bytes written, top, height, left, width of what it holds); 0 bytes if the image has to be decoded whole.
    """
    height, width = shape
    size_at, scan, interval = _find_scan(source)
    across, down = -(-width // unit[1]), -(-height // unit[0])
    if interval == 0 or across % interval:
        return 0, 0, 0, 0, 0
    parts = across // interval
    top, bottom = need[0] // unit[0], min(-(-need[1] // unit[0]), down)
    left, right = need[2] // (unit[1] * interval), min(-(-need[3] // (unit[1] * interval)), parts)
    if top == 0 and bottom == down and left == 0 and right == parts:
        return 0, 0, 0, 0, 0
    new_height, new_width = (bottom - top) * unit[0], (right - left) * interval * unit[1]
    if max(new_height, new_width) > MAX_SIDE:  # whole MCUs may reach beyond what a JPEG can be
        return 0, 0, 0, 0, 0
    source_at, out_at = u64(source.ctypes.data), u64(out.ctypes.data)
    _memcpy(out_at, source_at, u64(scan))
    out[size_at], out[size_at + 1] = new_height >> 8, new_height & 255
    out[size_at + 2], out[size_at + 3] = new_width >> 8, new_width & 255
    written, begin, kept = scan, scan, 0
    for part in range((bottom - 1) * parts + right):
        end = _next_restart(source, begin)
        # The last interval of all ends with EOI, the others with RST0 to RST7 in turn. Else let libjpeg judge.
        expected = 0xD9 if part == down * parts - 1 else 0xD0 + part % 8
        if end < 0 or source[end + 1] != expected:
            return 0, 0, 0, 0, 0
        if part >= top * parts and left <= part % parts < right:
            if kept:
                out[written], out[written + 1] = 0xFF, 0xD0 + (kept - 1) % 8
                written += 2
            _memcpy(out_at + u64(written), source_at + u64(begin), u64(end - begin))
            written += end - begin
            kept += 1
        begin = end + 2
    out[written], out[written + 1] = 0xFF, 0xD9
    return written + 2, top * unit[0], new_height, left * interval * unit[1], new_width


# ------------------------------------------------------------------------------------------------------------- JPEGs
@numba.njit
def _make_table(start: Any, length: Any, out: Any, flipped: Any, interpolation: Any, memory: Any) -> Any:
    """The `Table` that resizes [start, start + length) to `out` pixels; see `_weigh`."""
    first, weights = memory
    taps = _weigh(start, length, out, flipped, interpolation, first[:out], weights)
    low, high, used = _span(first[:out], taps, weights)
    return Table(first[:out], weights, taps, low, high, used)


@numba.njit
def _make_coarse(fine: Any, factor: Any, smooth: Any, limit: Any, memory: Any) -> Any:
    """The table of a plane `factor` times coarser; see `_coarsen`."""
    first, weights = memory
    out = len(fine.first)
    taps = _coarsen(fine, factor, smooth, limit, first[:out], weights)
    low, high, used = _span(first[:out], taps, weights)
    return Table(first[:out], weights, taps, low, high, used)


@numba.njit
def _decode_planes(handle: Any, source: Any, shape: Any, sampling: Any, fine: Any, memory: Any, image: Any) -> Any:
    """Decode a YCbCr JPEG to planes, as little of it as the tables need, and resize them into `image`."""
    height, width = shape
    scratch, slots = memory.scratch, memory.slots
    fy, fx = FACTORS_Y[sampling], FACTORS_X[sampling]
    rows, columns = -(-height // fy), -(-width // fx)
    # libjpeg leaves very narrow chroma unsmoothed.
    smooth_x = fx == 2 and columns > 2
    smooth_y = fy == 2 and (fx == 1 or columns > 2)
    coarse = Axes(
        _make_coarse(fine.rows, fy, smooth_y, rows, memory.tables[2]),
        _make_coarse(fine.columns, fx, smooth_x, columns, memory.tables[3]),
    )
    need = (
        min(fine.rows.low, coarse.rows.low * fy),
        max(fine.rows.high, coarse.rows.high * fy),
        min(fine.columns.low, coarse.columns.low * fx),
        max(fine.columns.high, coarse.columns.high * fx),
    )
    unit = (8 * fy, 8 * fx)
    size = len(source)
    length, top, part_height, left, part_width = _cut_jpeg(source, shape, unit, need, scratch[: size + 2])
    data = scratch[:length] if length else source
    if length == 0:
        part_height, part_width = -(-height // unit[0]) * unit[0], -(-width // unit[1]) * unit[1]
    count, small = part_height * part_width, (part_height // fy) * (part_width // fx)
    start = size + 2
    luma = scratch[start : start + count]
    blue = scratch[start + count : start + count + small]
    red = scratch[start + count + small : start + count + 2 * small]
    pointers, strides = slots[:3], slots[3:5].view(np.int32)
    pointers[0], pointers[1], pointers[2] = luma.ctypes.data, blue.ctypes.data, red.ctypes.data
    strides[0], strides[1], strides[2] = part_width, part_width // fx, part_width // fx
    failed = _planes(
        handle, data.ctypes.data, u64(len(data)), pointers.ctypes.data, 0, strides.ctypes.data, 0, LIMIT_SCANS
    )
    if failed:
        return DAMAGED
    bottom, low = top + part_height, (top + part_height) // fy
    fine_rows, coarse_rows = min(bottom, height) - top, min(low, rows) - top // fy
    _resize_planes(
        Plane(luma, part_width, fine_rows, top, left),
        Plane(blue, part_width // fx, coarse_rows, top // fy, left // fx),
        Plane(red, part_width // fx, coarse_rows, top // fy, left // fx),
        fine,
        coarse,
        memory.work,
        image,
    )
    return 0


@numba.njit
def _decode_jpeg(handle: Any, source: Any, shape: Any, fine: Any, memory: Any, image: Any) -> Any:
    """Decode and resize one JPEG; returns its status."""
    height, width = shape
    header = memory.slots[5:7].view(np.int32)
    header[:] = -1
    at = header.ctypes.data
    address, size = source.ctypes.data, u64(len(source))
    _header(handle, address, size, at, at + 4, at + 8, at + 12)  # what it complains of, decoding will meet again
    sampling, space = header[2], header[3]
    if header[0] != width or header[1] != height or not RGB_SPACE <= space <= GREY_SPACE:
        return FOREIGN
    grey = image.shape[2] == 1 or space == GREY_SPACE
    if space == YCC and not grey and 0 <= sampling < len(FACTORS_X) and sampling != ONLY_LUMA:
        return _decode_planes(handle, source, shape, sampling, fine, memory, image)
    step, form = (ONE, GREY) if grey and space != RGB_SPACE else (THREE, RGB)
    pixels = memory.scratch[: height * width * step]
    if _pixels(handle, address, size, pixels.ctypes.data, width, 0, height, form, LIMIT_SCANS):
        return DAMAGED
    _resize_pixels(Plane(pixels, width * step, height, ZERO, ZERO), step, fine, memory.work, image)
    return 0


# ------------------------------------------------------------------------------------------------------------ colour
@numba.njit
def _blend(value: Any, other: Any, factor: Any) -> Any:
    """factor * value + (1 - factor) * other, clipped and cut to whole levels as torchvision does."""
    mixed = factor * f32(value) + (f32(1) - factor) * f32(other)
    return np.uint8(i32(min(max(mixed, f32(0)), f32(255))))


@numba.njit
def _grey_of(pixel: Any) -> Any:
    return np.uint8(i32(f32(0.2989) * f32(pixel[0]) + f32(0.587) * f32(pixel[1]) + f32(0.114) * f32(pixel[2])))


@numba.njit
def _mean_grey(image: Any) -> Any:
    total = np.int64(0)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            total += _grey_of(image[y, x]) if image.shape[2] == 3 else image[y, x, 0]
    return f32(total / (image.shape[0] * image.shape[1]))


@numba.njit
def _jitter(image: Any, factors: Any) -> None:
    """Brightness, contrast, saturation of uint8 [H, W, C] in place, each as torchvision's `adjust_…` on tensors."""
    one = f32(1)
    if factors[0] != one:
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                for c in range(image.shape[2]):
                    image[y, x, c] = _blend(image[y, x, c], 0, factors[0])
    if factors[1] != one:
        mean = _mean_grey(image)
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                for c in range(image.shape[2]):
                    image[y, x, c] = _blend(image[y, x, c], mean, factors[1])
    if factors[2] != one and image.shape[2] == 3:
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                grey = _grey_of(image[y, x])
                for c in range(3):
                    image[y, x, c] = _blend(image[y, x, c], grey, factors[2])


# ---------------------------------------------------------------------------------------------------------- the loop
@numba.njit
def _decode_sample(sample: Any, crop: Any, interpolation: Any, memory: Any, image: Any) -> Any:
    """Decode, cut, resize and flip one sample into `image` [H, W, C]; returns its status."""
    address, length, mode, height, width = sample
    top, left, tall, wide, flipped = crop
    if tall < 1 or wide < 1 or top < 0 or left < 0 or top + tall > height or left + wide > width:
        return FOREIGN
    fine = Axes(
        _make_table(top, tall, image.shape[0], ZERO, interpolation, memory.tables[0]),
        _make_table(left, wide, image.shape[1], flipped, interpolation, memory.tables[1]),
    )
    source = _bytes_at(address, length)
    if mode != JPEG:
        _resize_pixels(Plane(source, width * 3, height, ZERO, ZERO), THREE, fine, memory.work, image)
        return 0
    handle = _open()  # one per image, or a JPEG without tables of its own would be decoded with the last one's
    if handle == 0:
        return DAMAGED
    status = _decode_jpeg(handle, source, (height, width), fine, memory, image)
    _close(handle)
    return status


def _decode(
    table: Any, ids: Any, crops: Any, jitter: Any, images: Any, status: Any, interpolation: Any, buffers: Any
) -> None:
    addresses, lengths, modes, heights, widths = table
    scratch, floats, firsts = buffers.scratch, buffers.floats, buffers.firsts
    width, weights, out = buffers.sizes
    count = images.shape[2] * LANES
    work = Work(
        floats[: width * LANES],
        floats[width * LANES : 2 * width * LANES],
        floats[2 * width * LANES : 2 * width * LANES + 3 * count],
        scratch[: 3 * count],
    )
    at = 2 * width * LANES + 3 * count
    tables = (
        (firsts[:out], floats[at : at + weights]),
        (firsts[out : 2 * out], floats[at + weights : at + 2 * weights]),
        (firsts[2 * out : 3 * out], floats[at + 2 * weights : at + 3 * weights]),
        (firsts[3 * out : 4 * out], floats[at + 3 * weights : at + 4 * weights]),
    )
    memory = Memory(scratch[3 * count :], tables, work, buffers.slots)
    for k in range(len(ids)):
        i = ids[k]
        sample = (addresses[i], np.int64(lengths[i]), modes[i], np.int64(heights[i]), np.int64(widths[i]))
        crop = (crops[k, 0], crops[k, 1], crops[k, 2], crops[k, 3], crops[k, 4])
        status[k] = _decode_sample(sample, crop, interpolation, memory, images[k])
        if status[k]:
            images[k] = 0
        elif jitter[k, 0] != f32(1) or jitter[k, 1] != f32(1) or jitter[k, 2] != f32(1):
            _jitter(images[k], jitter[k])


# numba keeps one object per type. FFCV's own Loader marks this one read-only, in passing, for the whole process.
_BYTES = types.Array(u8, 1, "C")
_TABLE = types.Tuple((u64[::1], u64[::1], _BYTES, types.uint16[::1], types.uint16[::1]))
_SIGNATURE = types.void(
    _TABLE,
    i64[::1],
    i64[:, ::1],
    f32[:, ::1],
    u8[:, :, :, ::1],
    i32[::1],
    i64,
    types.NamedTuple((_BYTES, f32[::1], i32[::1], u64[::1], types.UniTuple(i64, 3)), Buffers),
)


_BYTES.mutable = True
_compiled = compiled(_decode, _SIGNATURE)
_own = threading.local()  # scratch memory: fresh pages for every call would cost more than the resize


def _memory(name: str, dtype: Any, size: int) -> Array:
    """At least `size` elements of this thread's memory, kept from call to call unless they are very many."""
    kept: Array | None = getattr(_own, name, None)
    if kept is None or len(kept) < size:
        kept = np.empty(size, dtype)
        if kept.nbytes <= KEEP_BYTES:
            setattr(_own, name, kept)
    return kept


def decode(
    table: tuple[Array, Array, Array, Array, Array],
    ids: Array,
    crops: Array,
    jitter: Array,
    images: Array,
    status: Array,
    interpolation: int,
) -> None:
    """Decode, cut, resize, flip and jitter samples of mapped `.beton` files. The GIL is free meanwhile.

    `table`: addresses and lengths uint64 [N], modes uint8 [N], heights and widths uint16 [N]; memory that they name
    must be mapped (`open_beton` checks the bounds). `ids` int64 [b], `crops` int64 [b, 5] (top, left, height, width,
    flipped), `jitter` float32 [b, 3] (factors of brightness, contrast, saturation; 1 = none), `images` uint8
    [b, H, W, C] to write (C 1 takes luma, or the first channel of raw pixels), `status` int32 [b] to write: 0 if all
    is well, DAMAGED or FOREIGN for a sample whose row is then zero. `interpolation`: a value of INTERPOLATIONS.
    """
    if not len(ids):
        return
    _BYTES.mutable = True
    lengths, heights, widths = (int(column[ids].max()) for column in (table[1], table[3], table[4]))
    out_height, out_width = images.shape[1:3]
    out, longest = max(out_height, out_width), max(heights, widths)
    weights = 4 * longest + 16 * out  # bounds `out` x taps of the finest and of the coarsest table
    sizes = (3 * widths + 3, weights, out)
    scratch = 3 * out_width * LANES + lengths + 2 + 3 * (heights + 32) * (widths + 32)
    floats = 2 * sizes[0] * LANES + 3 * out_width * LANES + 4 * weights
    buffers = Buffers(
        _memory("scratch", np.uint8, scratch),
        _memory("floats", np.float32, floats),
        _memory("firsts", np.int32, 4 * out),
        _memory("slots", np.uint64, 8),
        sizes,
    )
    _compiled(table, ids, crops, jitter, images, status, interpolation, buffers)
