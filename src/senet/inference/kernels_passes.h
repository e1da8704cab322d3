// Passes over maps that are no convolution: input, pooling, the sums of the squeeze, what remains of
// elementwise work. Included once per instruction set.

// The network's input with any strides to channels_last; a task is one row of the image.
void read_input(const Step& s, int64_t task) {
  const int64_t n = task / s.H, h = task % s.H;
  const float* from = s.x + n * s.strides[0] + h * s.strides[2];
  float* to = s.y + task * s.W * s.y_ld;
  for (int64_t c = 0; c < s.C; ++c)
    for (int64_t w = 0; w < s.W; ++w)
      to[w * s.y_ld + c] = from[c * s.strides[1] + w * s.strides[3]];
}

// A task is one row of the output; `panels` tells whether padding counts in an average.
template <bool kMax>
void pool(const Step& s, int64_t task) {
  const int64_t n = task / s.OH, top = task % s.OH * s.stride_h - s.pad_h;
  const int64_t bottom = std::min(top + s.kernel_h, s.H + s.pad_h);
  for (int64_t ow = 0; ow < s.OW; ++ow) {
    const int64_t left = ow * s.stride_w - s.pad_w;
    const int64_t right = std::min(left + s.kernel_w, s.W + s.pad_w);
    const int64_t h0 = std::max<int64_t>(top, 0), h1 = std::min(bottom, s.H);
    const int64_t w0 = std::max<int64_t>(left, 0), w1 = std::min(right, s.W);
    const int64_t count = s.panels ? (bottom - top) * (right - left) : (h1 - h0) * (w1 - w0);
    float* to = s.y + (task * s.OW + ow) * s.y_ld;
    for (int64_t c = 0; c < s.C; c += kWidth) {
      V value = splat<float, kWidth>(kMax ? -INFINITY : 0.0f);
      for (int64_t h = h0; h < h1; ++h) {
        const float* row = s.x + (n * s.H + h) * s.W * s.x_ld + c;
        for (int64_t w = w0; w < w1; ++w) {
          const V x = load<kWidth>(row + w * s.x_ld);
          if constexpr (kMax)
            value = (x <= value) | (value != value) ? value : x;  // a NaN wins and stays
          else
            value += x;
        }
      }
      if constexpr (!kMax) value /= splat<float, kWidth>(float(count));
      store_columns(to + c, value, s.C - c);
    }
  }
}

// Sums over parts of an image: x → y[N][blocks][y_ld], a task is one part of one image.
SENET_INLINE int64_t sum_blocks(const Step& s) { return ceil_div(s.H * s.W, s.rows); }

template <int kVectors>
SENET_INLINE void sum_columns(const float* x, int64_t ld, int64_t rows, float* to, int64_t columns) {
  V sum[2][kVectors] = {};
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2)
    for (int u = 0; u < 2; ++u)
      for (int v = 0; v < kVectors; ++v) sum[u][v] += load<kWidth>(x + (r + u) * ld + v * kWidth);
  if (r < rows)
    for (int v = 0; v < kVectors; ++v) sum[0][v] += load<kWidth>(x + r * ld + v * kWidth);
  for (int v = 0; v < kVectors; ++v)
    store_columns(to + v * kWidth, sum[0][v] + sum[1][v], columns - v * kWidth);
}

void sum_rows(const float* x, int64_t ld, int64_t rows, float* to, int64_t columns) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= columns; c += 4 * kWidth)
    sum_columns<4>(x + c, ld, rows, to + c, columns - c);
  for (; c < columns; c += kWidth) sum_columns<1>(x + c, ld, rows, to + c, columns - c);
}

void sums(const Step& s, int64_t task) {
  const int64_t blocks = sum_blocks(s), pixels = s.H * s.W, n = task / blocks, block = task % blocks;
  const int64_t begin = pixels * block / blocks, end = pixels * (block + 1) / blocks;
  sum_rows(s.x + (n * pixels + begin) * s.x_ld, s.x_ld, end - begin, s.y + task * s.y_ld, s.C);
}

// The part of a sum that tap (i, j) of a convolution of stride 1 does not see, taken off `total`.
void take_off_border(const Step& s, const float* image, int64_t i, int64_t j, float* total) {
  const int64_t h0 = std::max<int64_t>(0, i * s.dilation_h - s.pad_h);
  const int64_t h1 = std::min(s.H, s.OH + i * s.dilation_h - s.pad_h);
  const int64_t w0 = std::max<int64_t>(0, j * s.dilation_w - s.pad_w);
  const int64_t w1 = std::min(s.W, s.OW + j * s.dilation_w - s.pad_w);
  for (int64_t h = 0; h < s.H; ++h) {
    const bool seen = h >= h0 && h < h1;
    for (int64_t w = 0; w < s.W; ++w) {
      if (seen && w == w0) w = std::max(w0, w1);  // jump over the columns that are seen
      if (w >= s.W) break;
      const float* x = image + (h * s.W + w) * s.x_ld;
      for (int64_t c = 0; c < s.C; ++c) total[c] -= x[c];
    }
  }
}

// Means per tap: `weights` is [N][blocks][C] from `sums`, x the map; y[N][kernel_h * kernel_w * C].
void means(const Step& s, int64_t task) {
  const int64_t taps = s.kernel_h * s.kernel_w, n = task / taps, tap = task % taps;
  const int64_t blocks = sum_blocks(s);
  float* to = s.y + n * s.y_ld + tap * s.C;
  const float* part = s.weights + n * blocks * s.gates_ld;
  copy(to, part, s.C);
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t c = 0; c < s.C; ++c) to[c] += part[b * s.gates_ld + c];
  take_off_border(s, s.x + n * s.H * s.W * s.x_ld, tap / s.kernel_w, tap % s.kernel_w, to);
  const float share = 1.0f / float(s.OH * s.OW);
  for (int64_t c = 0; c < s.C; ++c) to[c] *= share;
}

// y = activation(gates * (x * weights + bias) + shortcut), each part optional; a task is `rows` rows
// of one image.
void pointwise(const Step& s, int64_t task) {
  const int64_t pixels = s.H * s.W, blocks = ceil_div(pixels, s.rows);
  const int64_t n = task / blocks, block = task % blocks;
  const int64_t begin = pixels * block / blocks, end = pixels * (block + 1) / blocks;
  for (int64_t row = n * pixels + begin; row < n * pixels + end; ++row)
    for (int64_t c = 0; c < s.C; c += kWidth) {
      V value = load<kWidth>(s.x + row * s.x_ld + c);
      if (s.weights) value *= load<kWidth>(s.weights + c);
      if (s.bias) value += load<kWidth>(s.bias + c);
      if (s.gates) value *= load<kWidth>(s.gates + n * s.gates_ld + c);
      if (s.shortcut) value += load<kWidth>(s.shortcut + row * s.shortcut_ld + c);
      if (s.activation == kPositive) value = relu(value);
      store_columns(s.y + row * s.y_ld + c, value, s.C - c);
    }
}
