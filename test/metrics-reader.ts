/** The value of each series, by its name with its labels, as Prometheus would read them. */
export type Series = Map<string, number>

/** Returns the series of a text in Prometheus' format. Throws for a line that is none. */
export function parseMetrics (text: string): Series {
  const series: Series = new Map()
  for (const line of text.split('\n')) {
    if (line === '' || /^# (?:HELP|TYPE) \w+ .+/.test(line)) continue
    const [, name, text] = /^(\w+(?:\{(?:\w+="(?:[^"\\\n]|\\.)*",?)*\})?) (\S+)$/.exec(line) ?? []
    const value = text === 'Nan' ? NaN : Number(text?.replace('+Inf', 'Infinity'))
    if (name === undefined || (text !== 'Nan' && Number.isNaN(value))) throw new Error(`not a series: ${line}`)
    if (series.has(name)) throw new Error(`twice: ${name}`)
    series.set(name, value)
  }
  return series
}

/** Resolves with the series of a relay's METRICS_PORT. */
export async function readMetrics (url: string): Promise<Series> {
  const answer = await fetch(`${url}/metrics`)
  if (answer.status !== 200) throw new Error(`/metrics answered ${answer.status}`)
  return parseMetrics(await answer.text())
}

/** Returns the sum of a metric over all series that have these labels. */
export const sum = (series: Series, name: string, labels: Record<string, string> = {}): number =>
  [...series].filter(([key]) => key.split('{')[0] === name && Object.entries(labels).every(([label, value]) => key.includes(`${label}="${value}"`)))
    .reduce((total, [, value]) => total + value, 0)
