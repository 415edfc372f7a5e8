/* What the service calls of the CUDA runtime library, in the host's memory, as late as CUDA may do it: nothing that was
   asked for happens before the stream is waited for. Fresh memory is not zero. */

#include <stdlib.h>
#include <string.h>

enum { limit = 1 << 24, out_of_memory = 2, invalid_value = 1, not_ready = 600 };

typedef struct {
    void *destination;
    const void *source; /* NULL: fill with `value` */
    size_t destination_pitch, source_pitch, width, height;
    int value;
} work;

static work *queue;
static size_t queued;
static size_t done;
static size_t taken;
static int last_error;
static int the_stream;

static int failed(int status) {
    last_error = status;
    return status;
}

static int later(work next, const void *stream) {
    if (stream != &the_stream || next.width > next.destination_pitch || (next.source && next.width > next.source_pitch))
        return failed(invalid_value);
    queue = realloc(queue, (queued + 1) * sizeof(work));
    queue[queued++] = next;
    return 0;
}

int cudaStreamSynchronize(void *stream) {
    if (stream != &the_stream)
        return failed(invalid_value);
    for (size_t i = 0; i < queued; i++)
        for (size_t row = 0; row < queue[i].height; row++) {
            char *destination = (char *)queue[i].destination + row * queue[i].destination_pitch;
            if (queue[i].source)
                memcpy(destination, (const char *)queue[i].source + row * queue[i].source_pitch, queue[i].width);
            else
                memset(destination, queue[i].value, queue[i].width);
        }
    done += queued;
    queued = 0;
    return 0;
}

int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }
int cudaDriverGetVersion(int *version) { return *version = 13010, 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
    return flags == 1 ? (*stream = &the_stream, 0) : failed(invalid_value);
}
int cudaMemGetInfo(size_t *free_bytes, size_t *total) { return *free_bytes = limit - taken, *total = limit, 0; }

int cudaMalloc(void **address, size_t size) {
    if (taken + size > limit)
        return failed(out_of_memory);
    size_t *memory = malloc(sizeof(size_t) * 2 + size);
    memory[0] = size;
    taken += size;
    *address = memset(memory + 2, 0xAB, size);
    return 0;
}

int cudaFree(void *address) {
    cudaStreamSynchronize(&the_stream);
    size_t *memory = (size_t *)address - 2;
    taken -= memory[0];
    free(memory);
    return 0;
}

int cudaMallocHost(void **address, size_t size) { return *address = memset(malloc(size), 0xAB, size), 0; }
int cudaFreeHost(void *address) { return free(address), 0; }

int cudaMemsetAsync(void *address, int value, size_t size, void *stream) {
    return later((work){address, NULL, size, 0, size, 1, value}, stream);
}

int cudaMemcpyAsync(void *destination, const void *source, size_t size, int kind, void *stream) {
    return kind < 1 || kind > 3 ? failed(invalid_value)
                                : later((work){destination, source, size, size, size, 1, 0}, stream);
}

int cudaMemcpy2DAsync(void *destination, size_t destination_pitch, const void *source, size_t source_pitch,
                      size_t width, size_t height, int kind, void *stream) {
    return kind < 1 || kind > 3
               ? failed(invalid_value)
               : later((work){destination, source, destination_pitch, source_pitch, width, height, 0}, stream);
}

/* An event is how much was to be done before it; each piece of work takes a millisecond. */
int cudaEventCreate(void **event) { return *event = calloc(1, sizeof(size_t)), 0; }
int cudaEventRecord(void *event, void *stream) {
    return stream == &the_stream ? (*(size_t *)event = done + queued, 0) : failed(invalid_value);
}
int cudaEventElapsedTime(float *milliseconds, void *first, void *last) {
    size_t from = *(size_t *)first, to = *(size_t *)last;
    return to > done ? failed(not_ready) : (*milliseconds = (float)(to - from), 0);
}

int cudaGetLastError(void) {
    int error = last_error;
    last_error = 0;
    return error;
}

const char *cudaGetErrorString(int error) { return error == out_of_memory ? "out of memory" : "invalid argument"; }
