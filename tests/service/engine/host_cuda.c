/* A stand-in for the library of NVIDIA's driver that knows one device, "Stand-in 3000" of compute capability 12.1. */

#include <string.h>

enum { NO_DEVICE = 101, INVALID = 1, NOT_INITIALIZED = 3 };

static int initialized = 0;

int cuInit(unsigned flags)
{
    initialized = 1;
    return flags ? INVALID : 0;
}

int cuDeviceGet(int *device, int ordinal)
{
    if (!initialized)
        return NOT_INITIALIZED;
    *device = 7; /* a handle is not an index */
    return ordinal ? NO_DEVICE : 0;
}

int cuDeviceGetName(char *name, int length, int device)
{
    strncpy(name, "Stand-in 3000", length);
    return device == 7 ? 0 : INVALID;
}

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    *value = attribute == 75 ? 12 : attribute == 76 ? 1 : -1;
    return device == 7 ? 0 : INVALID;
}
