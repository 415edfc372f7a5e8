/* Stands in for NVIDIA's libraries where there is no GPU, so that ONNX Runtime's GPU build runs: device memory is the
 * host's, kernels do nothing, and every call is counted. What CUDA forbids while a run is captured is counted, too.
 *
 * Compiled once for each library, with its name defined. What is not here and is asked for, rehearse.py adds: functions
 * that do nothing, or make a handle, and succeed. CUDA 13.
 */

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef void *handle;

#ifdef CUDART

enum { TO_DEVICE = 1, TO_HOST = 2, ON_DEVICE = 3 };

static const size_t TOTAL = 139UL << 30;
static size_t used;
static volatile int is_capturing;

enum counter { LAUNCHES, GRAPH_LAUNCHES, CAPTURES, UPLOADS, DOWNLOADS, COPIES, WAITS, ALLOCATIONS, FORBIDDEN, NUM_COUNTERS };
static long counters[NUM_COUNTERS];

long stand_in_take(int counter) {
    long count = counters[counter];
    counters[counter] = 0;
    return count;
}

static int count(enum counter counter) {
    counters[counter]++;
    return 0;
}

/* Nothing of the kind may happen while any thread captures. */
static int alone(enum counter counter, const char *name) {
    if (is_capturing) {
        counters[FORBIDDEN]++;
        fprintf(stderr, "during a capture: %s\n", name);
    }
    return count(counter);
}

static int copied(int kind, const char *name) {
    if (is_capturing && kind != ON_DEVICE)
        alone(FORBIDDEN, name); /* the capture would keep what the host had then */
    return count(kind == TO_DEVICE ? UPLOADS : kind == TO_HOST ? DOWNLOADS : COPIES);
}

/* struct cudaDeviceProp, by offset: the numbers of an H200. */
int cudaGetDeviceProperties(char *properties, int device) {
    static const struct { size_t offset; int value; } numbers[] = {
        {304, 65536}, {308, 32}, {320, 1024}, {324, 1024}, {328, 1024}, {332, 64}, {336, 2147483647}, {340, 65535},
        {344, 65535}, {360, 9}, {364, 0}, {384, 132}, {596, 62914560}, {604, 2048}, {632, 65536}};
    static const struct { size_t offset; size_t value; } sizes[] = {
        {288, 139UL << 30}, {296, 49152}, {312, 2147483647}, {624, 233472}, {672, 232448}};
    memset(properties, 0, 1008);
    strcpy(properties, "NVIDIA H200");
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        memcpy(properties + numbers[i].offset, &numbers[i].value, sizeof(int));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        memcpy(properties + sizes[i].offset, &sizes[i].value, sizeof(size_t));
    return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 97 ? 232448 : attribute == 16 ? 132 : attribute == 1 ? 1024 : 0;
    return 0;
}

int cudaFuncGetAttributes(char *attributes, const void *function) {
    const int most_threads = 1024, version = 90;
    memset(attributes, 0, 144);
    memcpy(attributes + 24, &most_threads, sizeof(int));
    memcpy(attributes + 32, &version, sizeof(int));
    memcpy(attributes + 36, &version, sizeof(int));
    return 0;
}

int cudaPointerGetAttributes(int *attributes, const void *pointer) {
    memset(attributes, 0, 88);
    attributes[0] = 2; /* cudaMemoryTypeDevice */
    return 0;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f, int threads, size_t n, unsigned g) {
    *blocks = 2;
    return 0;
}

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
const char *cudaGetErrorString(int status) { return "an error"; }
const char *cudaGetErrorName(int status) { return "error"; }

int cudaMalloc(void **address, size_t size) {
    alone(ALLOCATIONS, "cudaMalloc");
    used += size;
    return posix_memalign(address, 256, size ? size : 1) ? 2 : 0;
}
int cudaMallocHost(void **address, size_t size) { *address = calloc(1, size); return alone(ALLOCATIONS, "cudaMallocHost"); }
int cudaHostAlloc(void **address, size_t size, unsigned flags) { return cudaMallocHost(address, size); }
int cudaFree(void *address) { free(address); return address ? alone(ALLOCATIONS, "cudaFree") : 0; }
int cudaFreeHost(void *address) { free(address); return alone(ALLOCATIONS, "cudaFreeHost"); }
int cudaMemGetInfo(size_t *left, size_t *total) { *total = TOTAL; *left = TOTAL - used; return 0; }

int cudaMemset(void *address, int value, size_t size) { memset(address, value, size); return alone(WAITS, "cudaMemset"); }
int cudaMemsetAsync(void *address, int value, size_t size, handle stream) { memset(address, value, size); return 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { memcpy(to, from, size); return alone(WAITS, "cudaMemcpy"); }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, handle stream) {
    memcpy(to, from, size);
    return copied(kind, "cudaMemcpyAsync between host and device");
}
int cudaMemcpy2DAsync(char *to, size_t to_pitch, const char *from, size_t pitch, size_t width, size_t height, int kind, handle s) {
    for (size_t row = 0; row < height; row++)
        memcpy(to + row * to_pitch, from + row * pitch, width);
    return copied(kind, "cudaMemcpy2DAsync between host and device");
}
int cudaMemcpyFromSymbol(void *to, const void *symbol, size_t size, size_t offset, int kind) {
    memset(to, 0, size);
    return alone(WAITS, "cudaMemcpyFromSymbol");
}

int cudaEventCreate(handle *event) { *event = calloc(1, 64); return 0; }
int cudaEventCreateWithFlags(handle *event, unsigned flags) { return cudaEventCreate(event); }
int cudaEventElapsedTime(float *milliseconds, handle first, handle last) { *milliseconds = 1; return 0; }
int cudaStreamCreate(handle *stream) { *stream = calloc(1, 64); return 0; }
int cudaStreamCreateWithFlags(handle *stream, unsigned flags) { return cudaStreamCreate(stream); }
int cudaDeviceSynchronize(void) { return alone(WAITS, "cudaDeviceSynchronize"); }
int cudaEventSynchronize(handle event) { return alone(WAITS, "cudaEventSynchronize"); }
int cudaStreamSynchronize(handle stream) { return alone(WAITS, "cudaStreamSynchronize"); }

int cudaStreamBeginCapture(handle stream, int mode) { is_capturing = 1; return count(CAPTURES); }
int cudaStreamEndCapture(handle stream, handle *graph) {
    usleep(5000); /* kernels that do nothing are captured in no time: who is careless would hardly ever be met */
    is_capturing = 0;
    *graph = calloc(1, 8);
    return 0;
}
int cudaStreamIsCapturing(handle stream, int *status) { *status = is_capturing; return 0; }
int cudaGraphInstantiate(handle *run, handle graph, unsigned long long flags) { *run = calloc(1, 8); return 0; }
int cudaGraphLaunch(handle run, handle stream) { return count(GRAPH_LAUNCHES); }

struct dim3 { unsigned x, y, z; };
static __thread struct { struct dim3 grid, block; size_t shared; void *stream; } configuration;

unsigned __cudaPushCallConfiguration(struct dim3 grid, struct dim3 block, size_t shared, void *stream) {
    configuration.grid = grid, configuration.block = block, configuration.shared = shared, configuration.stream = stream;
    return 0;
}
int __cudaPopCallConfiguration(struct dim3 *grid, struct dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
    *(void **)stream = configuration.stream;
    return 0;
}
void **__cudaRegisterFatBinary(void *binary) { return calloc(1, 8); }
int __cudaGetKernel(handle *kernel, const void *function) { *kernel = (handle)function; return 0; }
int __cudaLaunchKernel(void) { return count(LAUNCHES); }
int cudaLaunchKernel(void) { return count(LAUNCHES); }
int cudaLaunchKernelExC(void) { return count(LAUNCHES); }
int cudaLaunchCooperativeKernel(void) { return count(LAUNCHES); }
int cudaLaunchHostFunc(handle stream, void (*function)(void *), void *data) {
    function(data);
    return alone(WAITS, "cudaLaunchHostFunc");
}
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long f, int *found) {
    *function = NULL;
    return 0;
}

#endif

#ifdef CUBLASLT
int cublasLtMatmulAlgoGetHeuristic(handle a, handle b, handle c, handle d, handle e, handle f, handle g, int n, void *r, int *found) {
    *found = 0;
    return 0;
}
#endif

#ifdef CUBLAS
int cublasGetMathMode(handle cublas, int *mode) { *mode = 0; return 0; }
#endif

#ifdef CUDNN
size_t cudnnGetVersion(void) { return 91900; }
int cudnnGetReductionWorkspaceSize(handle a, handle b, handle c, handle d, size_t *size) { *size = 1024; return 0; }
int cudnnGetReductionIndicesSize(handle a, handle b, handle c, handle d, size_t *size) { *size = 1024; return 0; }
int cudnnBackendCreateDescriptor(int kind, handle *descriptor) { *descriptor = calloc(1, 64); return 0; }
int cudnnBackendFinalize(handle descriptor) { return 3000; } /* not supported: whoever plans attention here fails */
#endif

#ifdef CUDA
int cuDeviceGet(int *device, int index) { *device = 0; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strcpy(name, "NVIDIA H200"); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
#endif
