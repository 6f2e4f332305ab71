// Memory traffic per source line: 32-byte sectors of a warp's global requests, bank conflicts of its shared ones.
// A warp request is the k-th time its lanes come to the same instruction between two meetings of the warp.
#include "state.h"

#include <algorithm>
#include <deque>

namespace emu {
struct Site {  // one instruction; Python mirrors it
    uint32_t pc, shared, kind, worst_conflict;
    uint64_t requests, bytes, sectors, phases, cycles;
};
struct Record {  // one access of one lane; Python mirrors it
    uint32_t block, thread, step, kind;
    int32_t argument;  // -1 for shared memory
    uint32_t size;
    uint64_t offset;
    uint32_t pc, unused;
};
struct Request { uint32_t mask, size; uint64_t address[32]; };
struct Open { std::deque<Request> requests; uint32_t first = 0; };

static std::vector<Site> sites;
static std::unordered_map<uint64_t, uint32_t> site_of;
static std::vector<Open> open[32];           // by warp, then by site
static std::vector<uint32_t> touched[32];    // sites with open requests
static std::vector<Record> records;

void start_counters() {
    sites.clear();
    site_of.clear();
    records.clear();
    for (auto& warp : open) warp.clear();
    for (auto& warp : touched) warp.clear();
    for (uint32_t t = 0; t < launch.threads; t++) lanes[t].occurrences.clear();
}

static uint32_t site(bool shared, Kind kind, uint32_t pc) {
    uint64_t key = (uint64_t)pc << 3 | (uint64_t)shared << 2 | kind;
    auto found = site_of.emplace(key, (uint32_t)sites.size());
    if (found.second) sites.push_back({pc, shared, (uint32_t)kind, 0, 0, 0, 0, 0, 0});
    return found.first->second;
}

// The lanes of a phase are served together; words of one bank that differ are served one after the other.
static uint32_t conflict(const uint64_t* words, int count) {
    uint64_t distinct[32];
    std::copy(words, words + count, distinct);
    std::sort(distinct, distinct + count);
    int n = (int)(std::unique(distinct, distinct + count) - distinct);
    uint32_t in_bank[32] = {}, worst = 0;
    for (int i = 0; i < n; i++) worst = std::max(worst, ++in_bank[distinct[i] % 32]);
    return worst;
}

static void add_phase(Site& s, const uint64_t* words, int count) {
    if (!count) return;
    uint32_t cycles = conflict(words, count);
    s.phases++;
    s.cycles += cycles;
    s.worst_conflict = std::max(s.worst_conflict, cycles);
}

static void add_shared(Site& s, const Request& r) {
    int lanes_at_once = r.size <= 4 ? 32 : r.size == 8 ? 16 : 8, per_lane = r.size <= 4 ? 1 : (int)r.size / 4;
    for (int first = 0; first < 32; first += lanes_at_once) {
        uint64_t words[32];
        int count = 0;
        for (int l = first; l < first + lanes_at_once; l++)
            for (int w = 0; (r.mask >> l & 1) && w < per_lane && count < 32; w++) words[count++] = r.address[l] / 4 + w;
        add_phase(s, words, count);
    }
}

static void add_global(Site& s, const Request& r) {
    uint64_t sectors[64];
    int count = 0;
    for (int l = 0; l < 32; l++) {
        if (!(r.mask >> l & 1)) continue;
        sectors[count++] = r.address[l] / 32;
        sectors[count++] = (r.address[l] + r.size - 1) / 32;
    }
    std::sort(sectors, sectors + count);
    s.sectors += std::unique(sectors, sectors + count) - sectors;
}

static void settle(Site& s, const Request& r) {
    s.requests++;
    s.bytes += (uint64_t)r.size * __builtin_popcount(r.mask);
    if (s.shared) add_shared(s, r);
    else add_global(s, r);
}

void count(bool shared, Kind kind, uint64_t address, uint32_t size, uint32_t pc, int argument, uint64_t offset) {
    Lane& me = *current;
    if (records.size() < launch.config.record_limit)
        records.push_back({launch.block_id, me.thread, me.steps, (uint32_t)kind, argument, size, offset, pc, 0});
    if (!launch.config.counters) return;
    uint32_t warp = me.thread >> 5, s = site(shared, kind, pc);
    if (open[warp].size() <= s) open[warp].resize(s + 1);
    if (me.occurrences.size() <= s) me.occurrences.resize(s + 1);
    Open& o = open[warp][s];
    if (o.requests.empty() && o.first == 0) touched[warp].push_back(s);
    uint32_t k = me.occurrences[s]++ - o.first;
    while (o.requests.size() <= k) o.requests.push_back({0, size, {}});
    Request& r = o.requests[k];
    r.mask |= 1u << lane_of(me);
    r.address[lane_of(me)] = address;
    while (!o.requests.empty() && o.requests.front().mask == 0xffffffffu) {
        settle(sites[s], o.requests.front());
        o.requests.pop_front();
        o.first++;
    }
}

void count_matrix(const Lane* warp, int matrices, uint32_t pc) {  // each 8x8 matrix is one phase of eight 16-byte rows
    Site& s = sites[site(true, READ, pc)];
    s.requests++;
    for (int m = 0; m < matrices; m++) {
        uint64_t words[32];
        for (int r = 0; r < 8; r++)
            for (int w = 0; w < 4; w++) words[4 * r + w] = (uint64_t)warp[8 * m + r].in_a / 4 + w;
        add_phase(s, words, 32);
        s.bytes += 128;
    }
}

void flush_counters(uint32_t warp) {
    for (uint32_t s : touched[warp]) {
        for (const Request& r : open[warp][s].requests) settle(sites[s], r);
        open[warp][s].requests.clear();
        open[warp][s].first = 0;
        for (uint32_t t = warp * 32; t < warp * 32 + 32 && t < launch.threads; t++)
            if (lanes[t].occurrences.size() > s) lanes[t].occurrences[s] = 0;
    }
    touched[warp].clear();
}
}  // namespace emu

extern "C" __attribute__((visibility("default"))) uint64_t emu_sites(void* out, uint64_t capacity) {
    if (capacity >= emu::sites.size()) std::copy(emu::sites.begin(), emu::sites.end(), (emu::Site*)out);
    return emu::sites.size();
}
extern "C" __attribute__((visibility("default"))) uint64_t emu_records(void* out, uint64_t capacity) {
    if (capacity >= emu::records.size()) std::copy(emu::records.begin(), emu::records.end(), (emu::Record*)out);
    return emu::records.size();
}
