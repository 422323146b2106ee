import { readdir } from 'node:fs/promises'
import { monitorEventLoopDelay, performance } from 'node:perf_hooks'
import { cpuUsage, memoryUsage, versions } from 'node:process'
import type promClient from 'prom-client'

/** How often the event loop's lag is measured. */
const RESOLUTION_MS = 10

/**
 * Adds metrics of this process to a registry, under the names that prom-client's own have. Those observe every garbage
 * collection as well, which costs 3 % of the CPU of an identity (npm run bench -- --compare).
 */
export function addProcessMetrics ({ Counter, Gauge }: typeof promClient, registry: promClient.Registry): void {
  const registers = [registry]
  const counter = (name: string, help: string, read: () => number) => new Counter({
    name,
    help,
    registers,
    collect () {
      this.reset()
      this.inc(read())
    }
  })
  const gauge = (name: string, help: string, read: () => number | Promise<number>) => new Gauge({
    name, help, registers, async collect () { this.set(await read()) }
  })
  const seconds = (nanoseconds: number) => nanoseconds / 1e9

  counter('process_cpu_user_seconds_total', 'CPU time in user space.', () => cpuUsage().user / 1e6)
  counter('process_cpu_system_seconds_total', 'CPU time in the system.', () => cpuUsage().system / 1e6)
  counter('process_cpu_seconds_total', 'CPU time.', () => (cpuUsage().user + cpuUsage().system) / 1e6)
  gauge('process_start_time_seconds', 'When the process started.', () => performance.timeOrigin / 1000)
  gauge('process_resident_memory_bytes', 'Memory in RAM.', () => memoryUsage.rss())
  // Only Linux has this directory.
  gauge('process_open_fds', 'Open files.', () => readdir('/proc/self/fd').then(({ length }) => length, () => NaN))
  gauge('nodejs_heap_size_total_bytes', 'Heap of V8.', () => memoryUsage().heapTotal)
  gauge('nodejs_heap_size_used_bytes', 'Heap of V8 that is used.', () => memoryUsage().heapUsed)
  gauge('nodejs_external_memory_bytes', 'Memory outside of V8\'s heap.', () => memoryUsage().external)
  new Gauge({ name: 'nodejs_version_info', help: 'The version of Node.', labelNames: ['version'], registers })
    .set({ version: `v${versions.node}` }, 1)

  const lag = monitorEventLoopDelay({ resolution: RESOLUTION_MS })
  lag.enable()
  gauge('nodejs_eventloop_lag_p50_seconds', 'Lag of the event loop: the median since the last scrape.',
    () => seconds(lag.percentile(50)))
  gauge('nodejs_eventloop_lag_p99_seconds', 'Lag of the event loop: the 99th percentile since the last scrape.',
    () => seconds(lag.percentile(99)))
  gauge('nodejs_eventloop_lag_max_seconds', 'Lag of the event loop: the maximum since the last scrape.', () => {
    const max = seconds(lag.max)
    // The last of the three that is collected.
    lag.reset()
    return max
  })
  let before = performance.eventLoopUtilization()
  gauge('nodejs_eventloop_utilization', 'The share of time in which the event loop works.', () => {
    const now = performance.eventLoopUtilization()
    const { utilization } = performance.eventLoopUtilization(now, before)
    before = now
    return utilization
  })
}
