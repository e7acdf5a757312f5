/*
 * A client of iommufd that knows nothing of the model: it prints what every call answers, and nothing that depends on
 * the machine (no descriptors, no addresses). The same text comes from a real kernel.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define CMD(nr) (0x3b00 | (nr))
#define DESTROY CMD(0x80)
#define IOAS_ALLOC CMD(0x81)
#define IOAS_IOVA_RANGES CMD(0x84)
#define IOAS_MAP CMD(0x85)
#define IOAS_UNMAP CMD(0x86)

struct destroy { uint32_t size, id; };
struct ioas_alloc { uint32_t size, flags, id; };
struct ranges { uint32_t size, ioas, count, reserved; uint64_t array, alignment; };
struct map { uint32_t size, flags, ioas, reserved; uint64_t va, length, iova; };
struct unmap { uint32_t size, ioas; uint64_t iova, length; };

static int say(const char *what, int result)
{
	if (result < 0)
		printf("%s: %s\n", what, strerrorname_np(errno));
	else
		printf("%s: %d\n", what, result);
	return result;
}

static uint32_t alloc(const char *what, int fd)
{
	struct ioas_alloc arg = { .size = sizeof(arg) };

	say(what, ioctl(fd, IOAS_ALLOC, &arg));
	printf("  id %u\n", arg.id);
	return arg.id;
}

static void destroy(const char *what, int fd, uint32_t id)
{
	struct destroy arg = { .size = sizeof(arg), .id = id };

	say(what, ioctl(fd, DESTROY, &arg));
}

static void map(const char *what, int fd, uint32_t ioas, void *memory, uint64_t length, uint64_t iova)
{
	struct map arg = { .size = sizeof(arg), .flags = 7, .ioas = ioas, .va = (uintptr_t)memory, .length = length,
			   .iova = iova };

	say(what, ioctl(fd, IOAS_MAP, &arg));
	printf("  iova %#llx\n", (unsigned long long)arg.iova);
}

static void unmap(const char *what, int fd, uint32_t ioas, uint64_t iova, uint64_t length)
{
	struct unmap arg = { .size = sizeof(arg), .ioas = ioas, .iova = iova, .length = length };

	say(what, ioctl(fd, IOAS_UNMAP, &arg));
	printf("  length %#llx\n", (unsigned long long)arg.length);
}

static void ranges(const char *what, int fd, uint32_t ioas)
{
	uint64_t array[8] = { 0 };
	struct ranges arg = { .size = sizeof(arg), .ioas = ioas, .count = 4, .array = (uintptr_t)array };

	say(what, ioctl(fd, IOAS_IOVA_RANGES, &arg));
	printf("  %u ranges, alignment %llu, first %#llx-%#llx\n", arg.count, (unsigned long long)arg.alignment,
	       (unsigned long long)array[0], (unsigned long long)array[1]);
}

static int shared_fd;

static void *in_a_thread(void *unused)
{
	alloc("alloc in a thread", shared_fd);
	return unused;
}

int main(int argc, char **argv)
{
	int fd, copy, other, status, ends[2];
	pthread_t thread;
	uint32_t ioas, second;
	char *memory;
	pid_t child;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc > 2 && !strcmp(argv[1], "child")) { /* executed below */
		sscanf(argv[2], "%d", &fd);
		alloc("alloc after exec", fd);
		return 7;
	}
	memory = mmap(NULL, 4 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memset(memory, 0x5a, 4 * 4096);
	say("open of a file that is not there", open("/dev/vfio/devices/none", O_RDWR));
	fd = open("/dev/iommu", O_RDWR);
	printf("open: %s\n", fd < 0 ? strerrorname_np(errno) : "ok");
	ioas = alloc("alloc", fd);
	map("map", fd, ioas, memory, 2 * 4096, 0x100000);
	map("map over it", fd, ioas, memory, 4096, 0x101000);
	map("map of no memory of ours is looked at late", fd, ioas, (void *)0x1000, 4096, 0x200000);
	map("map that wraps", fd, ioas, memory, -4096ull, 0x300000);
	map("map to an odd iova", fd, ioas, memory, 4096, 0x300800);
	map("map into nothing", fd, 99, memory, 4096, 0x400000);
	ranges("iova ranges", fd, ioas);
	unmap("unmap a part", fd, ioas, 0x100000, 4096);
	unmap("unmap", fd, ioas, 0x100000, 2 * 4096);
	unmap("unmap again", fd, ioas, 0x100000, 2 * 4096);
	unmap("unmap everything", fd, ioas, 0, UINT64_MAX);
	say("null pointer", ioctl(fd, IOAS_ALLOC, NULL));
	say("unmapped pointer", ioctl(fd, IOAS_ALLOC, (void *)0x1000));
	say("kernel pointer", ioctl(fd, IOAS_ALLOC, (void *)0xffff888000000000));
	{
		uint32_t small[3] = { 4 }, large[64] = { sizeof(large), [40] = 1 };
		char *page = mmap(NULL, 2 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		struct ioas_alloc read_only = { .size = sizeof(read_only) };

		say("small struct", ioctl(fd, IOAS_ALLOC, small));
		say("large struct", ioctl(fd, IOAS_ALLOC, large));
		memcpy(page, &read_only, sizeof(read_only));
		mprotect(page, 4096, PROT_READ);
		say("struct in read-only memory", ioctl(fd, IOAS_ALLOC, page));
		mprotect(page, 4096, PROT_READ | PROT_WRITE);
		munmap(page + 4096, 4096);
		memcpy(page + 4096 - 8, &read_only, 8);
		say("struct over the end of memory", ioctl(fd, IOAS_ALLOC, page + 4096 - 8));
	}
	say("unknown number", ioctl(fd, CMD(0x7f), memory));
	say("unknown number at the end", ioctl(fd, CMD(0xff), memory));
	say("other type", ioctl(fd, 0x4b00, memory));
	say("read", read(fd, memory, 16));
	say("write", write(fd, memory, 16));
	say("pread", pread(fd, memory, 16, 0));
	say("mmap", mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED ? -1 : 0);
	say("ioctl of a closed descriptor", ioctl(555, IOAS_ALLOC, memory));
	say("ioctl of descriptor -1", ioctl(-1, IOAS_ALLOC, memory));
	say("pipe", pipe(ends));
	say("ioctl of a pipe", ioctl(ends[0], IOAS_ALLOC, memory));

	copy = dup(fd);
	destroy("destroy through a copy", copy, ioas);
	close(fd);
	ioas = alloc("alloc through the copy", copy);
	second = alloc("alloc through the copy", copy);
	map("map through the copy", copy, ioas, memory, 4096, 0x100000);
	other = open("/dev/iommu", O_RDWR | O_CLOEXEC);
	alloc("another open has ids of its own", other);
	printf("it is close-on-exec: %d, the first is not: %d\n", fcntl(other, F_GETFD), fcntl(copy, F_GETFD));

	child = fork();
	if (!child) {
		char number[16];

		destroy("the child destroys", copy, second);
		alloc("the child allocates", copy);
		map("the child maps its own memory", copy, ioas, memory, 4096, 0x500000);
		close(other);
		snprintf(number, sizeof(number), "%d", copy);
		execl("/proc/self/exe", "client", "child", number, NULL);
		_exit(99);
	}
	waitpid(child, &status, 0);
	printf("the child's status: %d\n", WEXITSTATUS(status));
	destroy("the parent does not find it", copy, second);
	unmap("the parent unmaps what the child mapped", copy, ioas, 0x500000, 4096);
	shared_fd = copy;
	pthread_create(&thread, NULL, in_a_thread, NULL);
	pthread_join(thread, NULL);

	dup2(copy, 20);
	close(copy);
	alloc("alloc through dup2", 20);
	close(20);
	say("it is closed", ioctl(20, IOAS_ALLOC, memory));
	alloc("the other lives", other);
	close(other);
	fd = open("/dev/iommu", O_RDWR);
	alloc("a new one begins again", fd);
	return 3;
}
