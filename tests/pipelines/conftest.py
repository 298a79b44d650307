"""A small program that calls libm, and its noise."""

import shutil
import subprocess

import pytest

from bids_varaug.pipelines.interposer import compile_interposer

PROGRAM = r"""
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
static double results[3];
static void *work(void *at) {
    double sum = 0;
    for (int i = 1; i < 1000; i++) sum += exp(1.0 / i) + cosf(i) + pow(i, 0.3);
    *(double *)at = sum;
    return NULL;
}
int main(int n, char **arguments) {
    if (n > 2 && arguments[2][0] == 'f') return atoi(arguments[2] + 1);
    FILE *file = fopen(arguments[1], "w");
    volatile double eight[2] = { 2, 3 }, zero = 0, huge = 1e300;
    fprintf(file, "%a %a %a\n", pow(eight[0], eight[1]), sin(zero), exp(huge));
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) pthread_create(&threads[i], NULL, work, &results[i]);
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < 3; i++) fprintf(file, "%a\n", results[i]);
    for (int i = 1; i < 2000; i++) fprintf(file, "%a %a\n", log(i + 0.5), (double)expf(i / 100.0f));
    fflush(file);
    if (fork() == 0) { fprintf(file, "child %a\n", exp(1.5)); fclose(file); _exit(0); }
    wait(NULL);
    return 0;
}
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    return compile_interposer(tmp_path_factory.mktemp("library"))


def build(folder, *flags):
    path = folder / ("program" + "".join(flags).replace("-", "_"))
    command = ["cc", "-O1", "-fno-builtin", "-x", "c", "-", *flags, "-o", str(path), "-lm", "-lpthread"]
    subprocess.run(command, input=PROGRAM.encode(), check=True)
    return path


@pytest.fixture(scope="session")
def program(library, tmp_path_factory):
    return build(tmp_path_factory.mktemp("program"))
