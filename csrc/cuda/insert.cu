// Fourier insertion on a GPU, twice: `insert_scatter` (a thread a coefficient, additions in the memory) and
// `insert_gather` (a thread a voxel, sums in registers, the same bits on every run). The contract stands in insert.h,
// the estimates behind this choice in benchmarks/gpu.md. In short, for 256 views of 256 px and P = 512 (52.7 million
// additions to a voxel) the memory's floor on an H100 is 0.4 ms; scattering should take 0.7 to 1.3, gathering 3 to 6.
#include <cstdint>

#include "../insert.h"
#include "../math.h"
#include "launch.h"

namespace cryosplat {
namespace cuda {

namespace {

using Index = std::int64_t;  // P^3 passes 2^31 at P = 1291, with four numbers a voxel at 813
template <class T>
using Vector = device::Vector3<T>;

constexpr int threads_in_block = 256;

// Voxels of a block of insert_gather. A warp has a compact 4 x 4 x 2 of them, so that it is near a view's plane, or far
// from it, as a whole; rows of 4 voxels are 64 bytes.
constexpr int brick_x = 8, brick_y = 8, brick_z = 4;

// Views that a block of insert_gather looks through between two barriers: one a thread.
constexpr int views_in_chunk = threads_in_block, bits = 32;

// Lengths compared in voxels are widened by this, far more than rounding (3e-5 at P = 512 in float) and than what a
// rotation in float lacks in orthogonality. Only the choice of candidates is widened; their weights are exact.
constexpr float slack = 0.01f;

// The diagonal of a cell: no voxel is farther from the points that reach it.
constexpr float diagonal = 1.7320508f;

// What is the same for all views.
template <class T>
struct Plan {
  Index views;
  int box, padded, half;  // D, P, P/2
  T to_grid, to_image;    // P/D, D/P
  double cycles;          // 1/D
};

// n, d and g of one voxel, read and written as one. No access is wider than 16 bytes.
template <class T>
struct alignas(16) Voxel {
  T real, imaginary, weight, coverage;
};

// One term of n and d before it is spread.
template <class T>
struct Coefficient {
  T real, imaginary, weight;
};

// (x, y, 0) in the frame of the grid is x a + y b; a and b are the first two rows of R, times P/D.
template <class T>
struct Plane {
  Vector<T> a, b;
};

template <class T>
__device__ Plane<T> plane(const Plan<T>& plan, const T* __restrict__ rotations, Index view) {
  const T* r = rotations + 9 * view;
  const T s = plan.to_grid;
  return {{s * r[0], s * r[1], s * r[2]}, {s * r[3], s * r[4], s * r[5]}};
}

template <class T>
__device__ Vector<T> point(const Plane<T>& plane, int kx, int ky) {
  const T x = T(kx), y = T(ky);
  return {x * plane.a.x + y * plane.b.x, x * plane.a.y + y * plane.b.y, x * plane.a.z + y * plane.b.z};
}

__device__ bool is_in_disc(int kx, int ky, int box) { return 4 * (kx * kx + ky * ky) < box * box; }

__device__ bool is_stored(int kx, int ky) { return kx > 0 || (kx == 0 && ky >= 0); }

__device__ void sine_cosine(float half_turns, float* sine, float* cosine) { sincospif(half_turns, sine, cosine); }
__device__ void sine_cosine(double half_turns, double* sine, double* cosine) { sincospi(half_turns, sine, cosine); }

// The view's coefficient, phases referring to the image's origin. exp(2 pi i k.(D/2)/D) is a sign; a shift makes many
// turns, so they are counted in double precision and only their fraction is rounded.
template <class T>
__device__ Coefficient<T> coefficient(const Plan<T>& plan, const InsertInputs<T>& in, Index view, int kx, int ky) {
  const Index at = (view * plan.box + (ky < 0 ? ky + plan.box : ky)) * (plan.box / 2 + 1) + kx;
  const T real = in.values[2 * at], imaginary = in.values[2 * at + 1];
  const double shift = double(kx) * double(in.shifts[2 * view]) + double(ky) * double(in.shifts[2 * view + 1]);
  const double turns = 0.5 * ((kx + ky) & 1) - shift * plan.cycles;
  T sine, cosine;
  sine_cosine(T(2.0 * (turns - rint(turns))), &sine, &cosine);
  return {real * cosine - imaginary * sine, real * sine + imaginary * cosine, in.weights[at]};
}

// Where frequency (x, y, z) is in the accumulators of all grids.
template <class T>
__device__ Index voxel(const Plan<T>& plan, Index grid, int x, int y, int z) {
  const Index row = z < 0 ? z + plan.padded : z, column = y < 0 ? y + plan.padded : y;
  return ((grid * plan.padded + row) * plan.padded + column) * (plan.half + 1) + x;
}

__device__ void add(Voxel<float>* to, float real, float imaginary, float weight, float coverage) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "f"(real), "f"(imaginary), "f"(weight), "f"(coverage)
               : "memory");
#else
  atomicAdd(&to->real, real);
  atomicAdd(&to->imaginary, imaginary);
  atomicAdd(&to->weight, weight);
  atomicAdd(&to->coverage, coverage);
#endif
}

__device__ void add(Voxel<double>* to, double real, double imaginary, double weight, double coverage) {
  atomicAdd(&to->real, real);
  atomicAdd(&to->imaginary, imaginary);
  atomicAdd(&to->weight, weight);
  atomicAdd(&to->coverage, coverage);
}

// Spreads a coefficient at point q over the corners of its cell.
template <class T>
__device__ void spread(const Plan<T>& plan, Index grid, Vector<T> q, Coefficient<T> c, Voxel<T>* voxels) {
  if (q.x < 0) {
    q = {-q.x, -q.y, -q.z};
    c.imaginary = -c.imaginary;
  }
  const T limit = T(plan.half);
  if (!(q.x < limit && fabs(q.y) < limit && fabs(q.z) < limit)) {  // not a rotation: said where everyone looks
    add(voxels + voxel(plan, grid, 0, 0, 0), T(NAN), T(NAN), T(NAN), T(NAN));
    return;
  }
  const T x = floor(q.x), y = floor(q.y), z = floor(q.z);
  const T fraction[3] = {q.x - x, q.y - y, q.z - z};
#pragma unroll
  for (int corner = 0; corner < 8; ++corner) {
    const int dx = corner & 1, dy = (corner >> 1) & 1, dz = corner >> 2;
    const T t = (dx ? fraction[0] : 1 - fraction[0]) * (dy ? fraction[1] : 1 - fraction[1]) *
                (dz ? fraction[2] : 1 - fraction[2]);
    if (t == 0) continue;  // frequent at axis-aligned poses; also keeps NaN from voxels that it does not reach
    add(voxels + voxel(plan, grid, int(x) + dx, int(y) + dy, int(z) + dz), t * c.real, t * c.imaginary, t * c.weight,
        c.weight != 0 ? t : T(0));
  }
}

// Threads: x along kx, y along the image's rows. Blocks: x and y likewise, z by view.
template <class T>
__global__ void __launch_bounds__(threads_in_block)
    insert_scatter(Plan<T> plan, InsertInputs<T> in, Voxel<T>* __restrict__ voxels) {
  const int kx = int(blockIdx.x * blockDim.x + threadIdx.x), row = int(blockIdx.y * blockDim.y + threadIdx.y);
  const int ky = row < plan.box / 2 ? row : row - plan.box;
  if (row >= plan.box || !is_stored(kx, ky) || !is_in_disc(kx, ky, plan.box)) return;
  for (Index view = blockIdx.z; view < plan.views; view += gridDim.z) {
    const Coefficient<T> c = coefficient(plan, in, view, kx, ky);
    if (c.real == 0 && c.imaginary == 0 && c.weight == 0) continue;  // beyond a limit of resolution
    spread(plan, in.grid[view], point(plane(plan, in.rotations, view), kx, ky), c, voxels);
  }
}

// A block's first voxel, as a frequency, and its grid. Frequencies run from -P/2 to P/2 - 1 along y and z.
struct Brick {
  Index grid;
  int x, y, z;
};

__host__ __device__ int count_bricks(int voxels, int side) { return (voxels + side - 1) / side; }

template <class T>
__device__ Brick brick_of_block(const Plan<T>& plan) {
  const unsigned along_x = count_bricks(plan.half + 1, brick_x), along_y = count_bricks(plan.padded, brick_y),
                 along_z = count_bricks(plan.padded, brick_z);
  const unsigned x = blockIdx.x % along_x, rest = blockIdx.x / along_x, y = rest % along_y, layer = rest / along_y;
  return {Index(layer / along_z), int(x) * brick_x, int(y) * brick_y - plan.half,
          int(layer % along_z) * brick_z - plan.half};
}

// Distance from the origin to the nearest of the frequencies first ... first + count - 1 of one axis.
__device__ int nearest(int first, int count) {
  const int last = first + count - 1;
  return first > 0 ? first : last < 0 ? -last : 0;
}

template <class T>
__device__ bool is_in_ball(const Plan<T>& plan, const Brick& brick) {
  const T x = T(nearest(brick.x, brick_x)), y = T(nearest(brick.y, brick_y)), z = T(nearest(brick.z, brick_z));
  const T radius = T(plan.half) + T(diagonal);
  return x * x + y * y + z * z <= radius * radius;
}

// The voxels that a view's plane reaches: |n.(q' - q)| is at most the sum of |n_a| for a point q and a corner q' of its
// cell, n being the plane's normal.
template <class T>
struct alignas(16) Slab {
  Vector<T> n;
  T reach;
};

// The normal from what spans the plane, so that R's third row, which insertion does not use, cannot contradict it.
template <class T>
__device__ Slab<T> slab(const Plan<T>& plan, const Plane<T>& p) {
  const T s = plan.to_image * plan.to_image;
  const Vector<T> n = {s * (p.a.y * p.b.z - p.a.z * p.b.y), s * (p.a.z * p.b.x - p.a.x * p.b.z),
                       s * (p.a.x * p.b.y - p.a.y * p.b.x)};
  return {n, fabs(n.x) + fabs(n.y) + fabs(n.z) + T(slack)};
}

// Whether a slab may reach voxels of a brick; true for NaN, which the voxels are to hear of.
template <class T>
__device__ bool is_reached(const Plan<T>& plan, const Slab<T>& slab, const Brick& brick) {
  if (brick.y == -plan.half || brick.z == -plan.half) return true;  // has voxels of frequency P/2, at the other end
  constexpr T x = T(brick_x - 1) / 2, y = T(brick_y - 1) / 2, z = T(brick_z - 1) / 2;
  const Vector<T> n = slab.n;
  const T distance = fabs(n.x * (brick.x + x) + n.y * (brick.y + y) + n.z * (brick.z + z));
  return !(distance > slab.reach + fabs(n.x) * x + fabs(n.y) * y + fabs(n.z) * z);
}

// Whole numbers of an image axis whose points may reach a voxel: those within `reach` of `centre`, and in the disc.
struct Range {
  int first, last;
};

template <class T>
__device__ Range candidates(const Plan<T>& plan, T centre, const Vector<T>& axis) {
  // Along the image axis the cell around the voxel is as wide as its corners are apart.
  const T to_image = plan.to_image * plan.to_image;
  const T reach = to_image * (fabs(axis.x) + fabs(axis.y) + fabs(axis.z)) + T(slack);
  const T limit = T(plan.box / 2 - 1);
  return {int(ceil(fmax(centre * to_image - reach, -limit))), int(floor(fmin(centre * to_image + reach, limit)))};
}

// T of a voxel, at frequency (x, y, z), and a point.
template <class T>
__device__ T share(const Vector<T>& q, int x, int y, int z) {
  return fmax(T(0), 1 - fabs(q.x - x)) * fmax(T(0), 1 - fabs(q.y - y)) * fmax(T(0), 1 - fabs(q.z - z));
}

// Adds what a view gives to the voxel at frequency (x, y, z). k runs over the whole disc: a k that is not stored stands
// for its mate, whose point was turned over because q_x < 0.
template <class T>
__device__ void gather(const Plan<T>& plan, const InsertInputs<T>& in, Index view, const Slab<T>& slab, int x, int y,
                       int z, Voxel<T>* sum) {
  const Vector<T> here = {T(x), T(y), T(z)};
  if (fabs(dot(slab.n, here)) > slab.reach) return;
  if (!(slab.reach < 2)) {  // more than sqrt(3): not a rotation
    *sum = {T(NAN), T(NAN), T(NAN), T(NAN)};
    return;
  }
  const Plane<T> p = plane(plan, in.rotations, view);
  const Range range_x = candidates(plan, dot(p.a, here), p.a), range_y = candidates(plan, dot(p.b, here), p.b);
  for (int ky = range_y.first; ky <= range_y.last; ++ky) {
    for (int kx = range_x.first; kx <= range_x.last; ++kx) {
      const Vector<T> q = point(p, kx, ky);
      const T t = share(q, x, y, z);
      const bool stored = is_stored(kx, ky);
      if (t == 0 || q.x < 0 || (q.x == 0 && !stored) || !is_in_disc(kx, ky, plan.box)) continue;
      const Coefficient<T> c = coefficient(plan, in, view, stored ? kx : -kx, stored ? ky : -ky);
      sum->real += t * c.real;
      sum->imaginary += t * (stored ? c.imaginary : -c.imaginary);
      sum->weight += t * c.weight;
      sum->coverage += c.weight != 0 ? t : T(0);
    }
  }
}

// Blocks that a multiprocessor is to hold at a time. With 4 a thread has 64 registers, with 2 it has 128, and these
// are enough; left to itself, ptxas takes fewer on some chips and puts the rest into memory.
template <class T>
constexpr int blocks_together = sizeof(T) == 4 ? 4 : 2;

// Threads: a voxel each, in the order of warps that brick_x explains. Blocks: a brick each.
template <class T>
__global__ void __launch_bounds__(threads_in_block, blocks_together<T>)
    insert_gather(Plan<T> plan, InsertInputs<T> in, Voxel<T>* __restrict__ voxels) {
  __shared__ unsigned reached[views_in_chunk / bits];  // a bit a view: the order of views is kept
  __shared__ Slab<T> slabs[views_in_chunk];
  __shared__ Brick brick;  // seldom read, so it need not occupy registers
  const int thread = int(threadIdx.x), lane = thread % bits, warp = thread / bits;
  const Brick own = brick_of_block(plan);
  if (!is_in_ball(plan, own)) return;
  if (thread == 0) brick = own;
  const int x = own.x + (lane & 3) + 4 * (warp & 1), y = own.y + ((lane >> 2) & 3) + 4 * ((warp >> 1) & 1),
            z = own.z + (lane >> 4) + 2 * (warp >> 2);
  const bool is_voxel = x <= plan.half && y < plan.half && z < plan.half;
  Voxel<T> sum = {0, 0, 0, 0};
  for (Index first = 0; first < plan.views; first += views_in_chunk) {
    const int chunk = int(plan.views - first < views_in_chunk ? plan.views - first : views_in_chunk);
    __syncthreads();  // the brick is there, and the chunk before has been read
    if (thread < views_in_chunk / bits) reached[thread] = 0;
    __syncthreads();
    if (thread < chunk && in.grid[first + thread] == brick.grid) {
      slabs[thread] = slab(plan, plane(plan, in.rotations, first + thread));
      if (is_reached(plan, slabs[thread], brick)) atomicOr(&reached[warp], 1u << lane);
    }
    __syncthreads();
    for (int word = 0; is_voxel && word * bits < chunk; ++word) {
      for (unsigned left = reached[word]; left; left &= left - 1) {
        const int view = word * bits + __ffs(int(left)) - 1;
        // Once; twice for a voxel of frequency -P/2, which is also that of P/2.
        for (int at_z = z; at_z <= plan.half; at_z += plan.padded) {
          for (int at_y = y; at_y <= plan.half; at_y += plan.padded) {
            gather(plan, in, first + view, slabs[view], x, at_y, at_z, &sum);
          }
        }
      }
    }
  }
  const bool is_changed = sum.real != 0 || sum.imaginary != 0 || sum.weight != 0 || sum.coverage != 0;
  if (!is_voxel || !is_changed) return;
  Voxel<T>& to = voxels[voxel(plan, brick.grid, x, y, z)];
  const Voxel<T> before = to;
  to = {before.real + sum.real, before.imaginary + sum.imaginary, before.weight + sum.weight,
        before.coverage + sum.coverage};
}

// Blocks along z, a view each, then the next; CUDA takes 65535, but these fill every GPU. And blocks along x.
constexpr Index most_layers = 1024, most_blocks = 2147483647;

}  // namespace

template <class Scalar>
const char* insert(const InsertShape& shape, const InsertInputs<Scalar>& in, Scalar* accumulators, bool deterministic,
                   const Stream& stream) {
  if (shape.views == 0 || shape.grids == 0) return nullptr;
  if (reinterpret_cast<std::uintptr_t>(accumulators) % alignof(Voxel<Scalar>)) {
    return "the accumulators' address is not divisible by 16";
  }
  const int box = int(shape.box), padded = int(shape.padded);
  const double to_grid = double(padded) / double(box);
  const Plan<Scalar> plan = {shape.views,     box, padded, padded / 2, Scalar(to_grid), Scalar(1 / to_grid),
                             1 / double(box)};
  Voxel<Scalar>* voxels = reinterpret_cast<Voxel<Scalar>*>(accumulators);
  if (deterministic) {
    const Index blocks = shape.grids * count_bricks(padded / 2 + 1, brick_x) * count_bricks(padded, brick_y) *
                         count_bricks(padded, brick_z);
    if (blocks > most_blocks) return "the grids have more blocks than a launch takes";
    return launch(insert_gather<Scalar>, dim3(unsigned(blocks)), dim3(threads_in_block), stream, plan, in, voxels);
  }
  const dim3 threads(32, threads_in_block / 32);
  const dim3 blocks(unsigned(count_bricks(box / 2, threads.x)), unsigned(count_bricks(box, threads.y)),
                    unsigned(shape.views < most_layers ? shape.views : most_layers));
  return launch(insert_scatter<Scalar>, blocks, threads, stream, plan, in, voxels);
}

template const char* insert(const InsertShape&, const InsertInputs<float>&, float*, bool, const Stream&);
template const char* insert(const InsertShape&, const InsertInputs<double>&, double*, bool, const Stream&);

}  // namespace cuda
}  // namespace cryosplat
