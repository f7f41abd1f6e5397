-- For wrk: onboarding with another device each time, whatever runs beside it and whenever.
-- Prints one line that scripts/bench.sh reads.
local threads = 0

function setup(thread)
    thread:set("id", threads)
    threads = threads + 1
end

function init()
    wrk.method = "POST"
    wrk.path = "/api/v1/onboarding"
    wrk.headers["Content-Type"] = "application/json"
    prefix = string.format('{"device_id":"b%x-%d-', os.time(), id)
    n = 0
end

function request()
    n = n + 1
    return wrk.format(nil, nil, nil, prefix .. n .. '"}')
end

function done(summary, latency)
    local errors = summary.errors
    io.write(string.format("result rate=%.1f requests=%d p50_ms=%.4f p99_ms=%.4f errors=%d\n",
        summary.requests / summary.duration * 1e6, summary.requests,
        latency:percentile(50) / 1000, latency:percentile(99) / 1000,
        errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
