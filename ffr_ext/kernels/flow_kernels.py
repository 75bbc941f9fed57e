"""Triton kernels of the flow loss; `flow.py` launches them.

A program owns a range of positions and walks along the depth with the last feature and the last difference in
registers: each feature is read once. Features are passed as a tuple of pointers, by value: a table of
pointers in memory would need a copy to the device at every call, which a CUDA graph would replay with stale
contents. The price is that the walk is unrolled, one compiled kernel per number of features.

No scalar argument is specialised on its value. Triton does specialise the pointers of a tuple on their
alignment, each of them, so the launcher sees to it that all are aligned; then a kernel is compiled once for a
dtype, a number of features and whether every group can be accessed by 16 bytes (`VECTOR`).
"""

# ruff: noqa: SIM102  # two nested ifs where the second indexes a tuple, which Triton evaluates in any case

import triton
import triton.language as tl

# ----------------------------------------------------------------------------------------------------------
# Pieces of the kernels
# ----------------------------------------------------------------------------------------------------------


@triton.jit
def _load(pointer, start, left, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Elements start .. start + BLOCK of a feature, zero from `left` on."""
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    offsets = tl.arange(0, BLOCK)
    return tl.load(pointer + start + offsets, mask=offsets < left, other=0.0)


@triton.jit
def _store(
    pointer,
    start,
    left,
    value,
    COMPUTE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes `value`, or adds it, with one rounding."""
    if ACCUMULATE:
        value += _load(pointer, start, left, VECTOR, BLOCK).to(COMPUTE)
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    offsets = tl.arange(0, BLOCK)
    tl.store(pointer + start + offsets, value.to(pointer.dtype.element_ty), mask=offsets < left)


@triton.jit
def _plane(signs, plane, plane_bytes, start, VEC: tl.constexpr, WORD: tl.constexpr, VECTOR: tl.constexpr):
    """Pointer to the nibbles of element `start` (a multiple of VEC) in a plane, as words of VEC nibbles."""
    first = signs + plane * plane_bytes + start // 2
    if VECTOR:
        first = tl.multiple_of(first, VEC // 2)
    return first.to(tl.pointer_type(WORD))


@triton.jit
def _load_codes(
    signs,
    plane,
    plane_bytes,
    start,
    left,
    VEC: tl.constexpr,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What `_twice_signs` reads: words of VEC nibbles, or a byte per element where a group may begin
    anywhere.
    """
    if VECTOR:
        offsets = tl.arange(0, BLOCK // VEC)
        pointers = _plane(signs, plane, plane_bytes, start, VEC, WORD, VECTOR) + offsets
        mask = offsets * VEC < left
    else:
        offsets = tl.arange(0, BLOCK)
        pointers = signs + plane * plane_bytes + (start + offsets) // 2
        mask = offsets < left
    return tl.load(pointers, mask=mask, other=0)


@triton.jit
def _twice_signs(
    loaded, start, COMPUTE: tl.constexpr, VEC: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):
    """2 * sign(d) and 2 * sign(c), one of each per element.

    Twice, because 2.0 and -2.0 are the bits 01 and 11 followed by zeros: a code becomes a float with a shift
    and a mask once the code 2 is made 3, for a whole word at once. Converting integers instead would make the
    16-bit kernel wait for arithmetic rather than memory.
    """
    codes = loaded.to(tl.uint32)
    codes |= (codes >> 1) & 0x55555555
    if VECTOR:
        codes = codes[:, None]
        to_top = (30 - 4 * tl.arange(0, VEC)).to(tl.uint32)[None, :]
    else:
        to_top = (30 - 4 * ((start + tl.arange(0, BLOCK)) & 1)).to(tl.uint32)
    first = ((codes << to_top) & 0xC0000000).to(tl.float32, bitcast=True)
    second = ((codes << (to_top - 2)) & 0xC0000000).to(tl.float32, bitcast=True)
    return tl.reshape(first, [BLOCK]).to(COMPUTE), tl.reshape(second, [BLOCK]).to(COMPUTE)


@triton.jit
def _store_codes(words, left, d_code, c_code, VEC: tl.constexpr, BLOCK: tl.constexpr):
    nibble = (4 * tl.arange(0, VEC)).to(tl.uint32)
    codes = tl.reshape(d_code | (c_code << 2), [BLOCK // VEC, VEC]) << nibble[None, :]
    offsets = tl.arange(0, BLOCK // VEC)
    packed = tl.sum(codes, axis=1)  # disjoint bits: the sum is their union
    tl.store(words + offsets, packed.to(words.dtype.element_ty), mask=offsets * VEC < left)


@triton.jit
def _sign_code(value):
    """0 for zero and NaN, 1 for positive, 2 for negative: csrc/common/signs.h."""
    return tl.where(value > 0, 1, tl.where(value < 0, 2, 0)).to(tl.uint32)


@triton.jit
def _magnitude(value, SQUARED: tl.constexpr):
    if SQUARED:
        return tl.sum(value * value)
    return tl.sum(tl.abs(value))


# ----------------------------------------------------------------------------------------------------------
# Forward
# ----------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["group_numel", "plane_bytes", "tiles", "groups", "first_row", "second_row"],
    do_not_specialize_on_alignment=["features", "signs", "slots"],
)
def forward_kernel(
    features,  # tuple of LENGTH pointers
    signs,  # the planes from the first of FIRSTS on; anything without SIGNS
    slots,  # [entries of the stage, tiles], or the stage's stats when a group is one tile
    group_numel: tl.int64,
    plane_bytes: tl.int64,
    tiles: tl.int32,  # of a group
    groups: tl.int64,
    first_row: tl.int64,  # entry of this piece's first |d| in group 0, and of its first |c|
    second_row: tl.int64,
    LENGTH: tl.constexpr,
    FIRSTS: tl.constexpr,  # terms this piece owns; LENGTH is up to FIRSTS + 2, the halo
    SECONDS: tl.constexpr,
    SQUARED: tl.constexpr,
    SIGNS: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    WORD: tl.constexpr,
    TERMS: tl.constexpr,  # power of two, at least FIRSTS
    BLOCK: tl.constexpr,
):
    # One tile, and no loop over several: the compiler moves every feature's and plane's address out of such a
    # loop, and 64 features then spill (seen: 255 registers and 696 bytes of stack, against 80 registers
    # without the loop).
    program = tl.program_id(0)  # a division of 32 bits: 64 would be a call with a stack
    group = (program // tiles).to(tl.int64)
    tile = (program % tiles).to(tl.int64)
    begin = tile * BLOCK
    if VECTOR:
        group_numel = tl.multiple_of(group_numel, VEC)
    left = tl.minimum(group_numel - begin, BLOCK).to(tl.int32)
    start = group * group_numel + begin
    if VECTOR:
        left = tl.multiple_of(left, VEC)
        start = tl.multiple_of(start, VEC)
    # Four loads in flight: x and the three behind it. They are issued here, ahead of the stores of the signs,
    # which may alias them for all the compiler knows.
    n0 = _load(features[0], start, left, VECTOR, BLOCK)
    n1 = _load(features[1], start, left, VECTOR, BLOCK)
    n2 = n1
    n3 = n1
    if LENGTH > 2:
        n2 = _load(features[2], start, left, VECTOR, BLOCK)
    if LENGTH > 3:
        n3 = _load(features[3], start, left, VECTOR, BLOCK)
    # A term's sum goes to the lane that keeps it: one select and one register per 32 terms, where an array
    # would need an index at run time.
    term = tl.arange(0, TERMS)
    first_sums = tl.zeros([TERMS], COMPUTE)
    second_sums = tl.zeros([TERMS], COMPUTE)
    previous = n0.to(COMPUTE)
    d = previous
    for i in tl.static_range(1, LENGTH):
        x = n1.to(COMPUTE)
        n1 = n2
        n2 = n3
        if i + 3 < LENGTH:
            n3 = _load(features[i + 3], start, left, VECTOR, BLOCK)
        d_before = d
        d = x - previous
        previous = x
        if i - 1 < FIRSTS:
            first_sums = tl.where(term == i - 1, _magnitude(d, SQUARED), first_sums)
        if i >= 2:
            c = d - d_before
            if i - 2 < SECONDS:
                second_sums = tl.where(term == i - 2, _magnitude(c, SQUARED), second_sums)
            if SIGNS:
                words = _plane(signs, i - 2, plane_bytes, start, VEC, WORD, VECTOR)
                _store_codes(words, left, _sign_code(d_before), _sign_code(c), VEC, BLOCK)
    if SIGNS and FIRSTS == LENGTH - 1:  # the stage's last plane, which has no c
        words = _plane(signs, FIRSTS - 1, plane_bytes, start, VEC, WORD, VECTOR)
        _store_codes(words, left, _sign_code(d), tl.zeros([BLOCK], tl.uint32), VEC, BLOCK)
    slot_type: tl.constexpr = slots.dtype.element_ty
    term_rows = term.to(tl.int64) * groups + group
    tl.store(slots + (first_row + term_rows) * tiles + tile, first_sums.to(slot_type), mask=term < FIRSTS)
    tl.store(slots + (second_row + term_rows) * tiles + tile, second_sums.to(slot_type), mask=term < SECONDS)


@triton.jit(do_not_specialize=["tiles", "parts"], do_not_specialize_on_alignment=["slots", "sums"])
def add_slots_kernel(slots, sums, tiles: tl.int32, parts: tl.int32, PART: tl.constexpr, BLOCK: tl.constexpr):
    """sums[row, part] = the sum of slots[row, part * PART :][:PART], in fp64 and in one order."""
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    begin = (program % parts) * PART
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for i in tl.static_range(0, PART // BLOCK):
        offsets = begin + i * BLOCK + lane
        total += tl.load(slots + row * tiles + offsets, mask=offsets < tiles, other=0.0).to(tl.float64)
    tl.store(sums + program, tl.sum(total))


# ----------------------------------------------------------------------------------------------------------
# Backward
#
# "Plane" l is the pair d_l, c_l (or its signs). It adds -a d + e c to gradient l, a d - 2 e c to l + 1 and e
# c to l + 2, so a walk over the planes needs two running sums: `here` and `after`, what earlier planes gave
# to gradients l and l + 1.
# ----------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["group_numel", "tiles", "plane_bytes", "groups", "first_plane", "firsts"],
    do_not_specialize_on_alignment=["signs", "coef", "grads"],
)
def backward_signs_kernel(
    signs,  # the stage's planes
    coef,  # the stage's coefficients
    grads,  # tuple of LENGTH pointers, None where not wanted
    group_numel: tl.int64,
    tiles: tl.int32,  # of a group
    plane_bytes: tl.int64,
    groups: tl.int64,
    first_plane: tl.int64,
    firsts: tl.int64,  # first differences of the stage
    LENGTH: tl.constexpr,  # gradients: of features first_plane + LEAD and on
    LEAD: tl.constexpr,  # planes before the first gradient's own, which still reach into it: up to 2
    PLANES: tl.constexpr,  # planes read: LEAD + LENGTH, one less where the stage ends
    ACCUMULATE: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    group = (program // tiles).to(tl.int64)
    begin = (program % tiles).to(tl.int64) * BLOCK
    if VECTOR:
        group_numel = tl.multiple_of(group_numel, VEC)
    left = tl.minimum(group_numel - begin, BLOCK).to(tl.int32)
    start = group * group_numel + begin
    if VECTOR:
        left = tl.multiple_of(left, VEC)
        start = tl.multiple_of(start, VEC)
    signs += first_plane * plane_bytes
    first_coef = coef + first_plane * groups + group
    second_coef = coef + (firsts + first_plane) * groups + group
    seconds = firsts - 1 - first_plane  # the last plane has no c
    here = tl.zeros([BLOCK], COMPUTE)
    after = tl.zeros([BLOCK], COMPUTE)
    # The next planes and coefficients are loaded ahead of the stores, which may alias them for all the
    # compiler knows.
    w0 = _load_codes(signs, 0, plane_bytes, start, left, VEC, WORD, VECTOR, BLOCK)
    a0 = tl.load(first_coef)
    e0 = tl.load(second_coef, mask=seconds > 0, other=0.0)
    w1 = w0
    a1 = a0
    e1 = e0
    if PLANES > 1:
        w1 = _load_codes(signs, 1, plane_bytes, start, left, VEC, WORD, VECTOR, BLOCK)
        a1 = tl.load(first_coef + groups)
        e1 = tl.load(second_coef + groups, mask=seconds > 1, other=0.0)
    for i in tl.static_range(0, PLANES):
        first, second = _twice_signs(w0, start, COMPUTE, VEC, VECTOR, BLOCK)
        first *= (0.5 * a0).to(COMPUTE)
        second *= (0.5 * e0).to(COMPUTE)
        w0 = w1
        a0 = a1
        e0 = e1
        if i + 2 < PLANES:
            w1 = _load_codes(signs, i + 2, plane_bytes, start, left, VEC, WORD, VECTOR, BLOCK)
            a1 = tl.load(first_coef + (i + 2) * groups)
            e1 = tl.load(second_coef + (i + 2) * groups, mask=seconds > i + 2, other=0.0)
        if i >= LEAD:
            if grads[i - LEAD] is not None:
                _store(
                    grads[i - LEAD], start, left, here - first + second, COMPUTE, ACCUMULATE, VECTOR, BLOCK
                )
        here = after + first - 2 * second
        after = second
    if PLANES < LEAD + LENGTH:
        if grads[LENGTH - 1] is not None:
            _store(grads[LENGTH - 1], start, left, here, COMPUTE, ACCUMULATE, VECTOR, BLOCK)


@triton.jit(
    do_not_specialize=["group_numel", "tiles", "groups", "first_plane", "firsts"],
    do_not_specialize_on_alignment=["features", "coef", "grads"],
)
def backward_squares_kernel(
    features,  # tuple of READ pointers: features first_plane and on
    coef,
    grads,  # as in backward_signs_kernel, and so on
    group_numel: tl.int64,
    tiles: tl.int32,
    groups: tl.int64,
    first_plane: tl.int64,
    firsts: tl.int64,
    READ: tl.constexpr,  # PLANES + 1, one more where the last plane has a c
    LENGTH: tl.constexpr,
    LEAD: tl.constexpr,
    PLANES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    group = (program // tiles).to(tl.int64)
    begin = (program % tiles).to(tl.int64) * BLOCK
    if VECTOR:
        group_numel = tl.multiple_of(group_numel, VEC)
    left = tl.minimum(group_numel - begin, BLOCK).to(tl.int32)
    start = group * group_numel + begin
    if VECTOR:
        left = tl.multiple_of(left, VEC)
        start = tl.multiple_of(start, VEC)
    first_coef = coef + first_plane * groups + group
    second_coef = coef + (firsts + first_plane) * groups + group
    here = tl.zeros([BLOCK], COMPUTE)
    after = tl.zeros([BLOCK], COMPUTE)
    n0 = _load(features[0], start, left, VECTOR, BLOCK)
    n1 = _load(features[1], start, left, VECTOR, BLOCK)
    n2 = n1
    n3 = n1
    if READ > 2:
        n2 = _load(features[2], start, left, VECTOR, BLOCK)
    if READ > 3:
        n3 = _load(features[3], start, left, VECTOR, BLOCK)
    x = n1.to(COMPUTE)
    d_after = x - n0.to(COMPUTE)
    for i in tl.static_range(0, PLANES):
        d = d_after
        first = 2 * tl.load(first_coef + i * groups).to(COMPUTE) * d
        second = tl.zeros([BLOCK], COMPUTE)
        if i + 2 < READ:
            e = 2 * tl.load(second_coef + i * groups).to(COMPUTE)
            x_after = n2.to(COMPUTE)
            n2 = n3
            if i + 4 < READ:
                n3 = _load(features[i + 4], start, left, VECTOR, BLOCK)
            d_after = x_after - x
            x = x_after
            second = e * (d_after - d)
        if i >= LEAD:
            if grads[i - LEAD] is not None:
                _store(
                    grads[i - LEAD], start, left, here - first + second, COMPUTE, ACCUMULATE, VECTOR, BLOCK
                )
        here = after + first - 2 * second
        after = second
    if PLANES < LEAD + LENGTH:
        if grads[LENGTH - 1] is not None:
            _store(grads[LENGTH - 1], start, left, here, COMPUTE, ACCUMULATE, VECTOR, BLOCK)
