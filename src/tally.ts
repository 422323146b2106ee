/**
 * Counts what happens for every identity. prom-client's own counters and histograms take the labels as an object and
 * make a text of them at every call: three calls for an identity cost 5 % of its CPU (npm run bench -- --compare).
 */

/** What prom-client's registry asks of a metric. */
export interface Collected {
  name: string
  help: string
  type: 'counter' | 'histogram'
  aggregator: 'sum'
  values: { metricName?: string, labels: Record<string, string | number>, value: number }[]
}

type Label = string | number

/** A metric for prom-client's registry. */
interface Metric { name: string, get: () => Collected }

interface Counted { labels: readonly Label[], value: number }

/** Returns a counter with so many labels. Most calls have the labels of the call before. */
export function createTally<const Names extends readonly string[]> (name: string, help: string, labelNames: Names) {
  const counted = new Map<string, Counted>()
  let last: Counted | undefined

  function find (labels: readonly Label[]): Counted {
    const key = labels.join('\n')
    const found = counted.get(key) ?? { labels: [...labels], value: 0 }
    counted.set(key, found)
    return found
  }

  const isLast = (a: Label, b: Label, c: Label | undefined) =>
    last !== undefined && last.labels[0] === a && last.labels[1] === b && last.labels[2] === c

  return {
    /** Adds `amount` for two or three labels, in the order of their names. */
    add (amount: number, a: Label, b: Label, c?: Label): void {
      if (!isLast(a, b, c)) last = find(c === undefined ? [a, b] : [a, b, c])
      ;(last as Counted).value += amount
    },
    metric: {
      name,
      get: () => ({
        name,
        help,
        type: 'counter',
        aggregator: 'sum',
        values: Array.from(counted.values(), ({ labels, value }) =>
          ({ labels: Object.fromEntries(labels.map((label, index) => [labelNames[index], label])), value }))
      })
    } satisfies Metric
  }
}

interface Durations { label: string, counts: number[], sum: number }

/** Returns a histogram of times with one label. `bounds` are the upper bounds of its buckets, in seconds. */
export function createDurations (name: string, help: string, labelName: string, bounds: readonly number[]) {
  const all = new Map<string, Durations>()
  let last: Durations | undefined

  function find (label: string): Durations {
    const found = all.get(label) ?? { label, counts: Array<number>(bounds.length + 1).fill(0), sum: 0 }
    all.set(label, found)
    return found
  }

  function valuesOf ({ label, counts, sum }: Durations): Collected['values'] {
    let total = 0
    const buckets = counts.map((count, index) => {
      total += count
      const labels = { le: bounds[index] ?? '+Inf', [labelName]: label }
      return { metricName: `${name}_bucket`, labels, value: total }
    })
    const labels = { [labelName]: label }
    return [
      ...buckets,
      { metricName: `${name}_sum`, labels, value: sum },
      { metricName: `${name}_count`, labels, value: total }
    ]
  }

  return {
    add (label: string, seconds: number): void {
      if (last?.label !== label) last = find(label)
      let index = 0
      while (index < bounds.length && seconds > (bounds[index] as number)) index++
      last.counts[index] = (last.counts[index] as number) + 1
      last.sum += seconds
    },
    metric: {
      name,
      get: () => ({ name, help, type: 'histogram', aggregator: 'sum', values: [...all.values()].flatMap(valuesOf) })
    } satisfies Metric
  }
}
