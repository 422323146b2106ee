/** An SVG of the CPU µs per identity: a bar each, on a logarithmic scale, for light and dark pages. */
export function picture (bars) {
  const width = 760
  const row = 34
  const left = 220
  const most = Math.max(...bars.map(({ cpu }) => cpu))
  const scale = value => Math.log10(value / 10) / Math.log10(most / 10) * (width - left - 90)
  const lines = bars.map(({ name, cpu, isOurs }, index) => {
    const y = 44 + index * row
    return `<text x="${left - 10}" y="${y + 16}" text-anchor="end">${name}</text>` +
      `<rect x="${left}" y="${y}" width="${Math.max(2, scale(cpu)).toFixed(0)}" height="22" rx="3" class="${isOurs ? 'ours' : 'bar'}"/>` +
      `<text x="${(left + Math.max(2, scale(cpu)) + 8).toFixed(0)}" y="${y + 16}">${cpu.toFixed(0)} µs</text>`
  })
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${60 + bars.length * row}" font-family="sans-serif" font-size="14">
<style>text { fill: #444 } .bar { fill: #9aa7b5 } .ours { fill: #5b3df5 } @media (prefers-color-scheme: dark) { text { fill: #ccc } }</style>
<text x="10" y="24" font-weight="bold">CPU time of the server for one identity, everything on (logarithmic)</text>
${lines.join('\n')}
</svg>
`
}
